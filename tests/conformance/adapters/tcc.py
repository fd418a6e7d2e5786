"""TCC: the values of its formulas, computed with the functions that training uses."""

import torch
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.methods.tcc import (
    TCC,
    cluster_contrast,
    relaxed_sample,
    sum_by_cluster,
)
from deepclust.nn.ema import make_target, update_target
from deepclust.nn.queue import Queue


class GivenNoise(Draws):
    """Draws that return the noise given by the case."""

    def __init__(self, noise):
        super().__init__(key=(0,), first_row=0, global_batch_size=len(noise))
        self.noise = noise

    def gumbel_like(self, values, purpose):
        return self.noise


def make_method(params, inputs, *, num_features):
    """Return a TCC in one direction, with the centres, context layer and queues of the case.

    The backbone passes features on as they are, and the keys are made by the same weights.
    """
    backbone = nn.Linear(num_features, num_features, bias=False)
    backbone.num_features = num_features
    num_clusters, embedding_size = inputs["centres"].shape
    cluster_queue = inputs.get("cluster_queue", torch.zeros(0, embedding_size))
    method = TCC(
        backbone=backbone,
        num_clusters=num_clusters,
        embedding_size=embedding_size,
        context=params["context"],
        ema_decay=0.0,
        symmetric=False,
        assignment_temperature=1.0,
        gumbel_temperature=params["gumbel_temperature"],
        instance_temperature=params["temperature"],
        cluster_temperature=params.get("cluster_temperature", 1.0),
        prior="each",
        prior_weight=1.0,
        cluster_vector="unit",
        cluster_weight=params.get("cluster_weight", 1.0),
        key_queue_size=max(1, len(inputs["queue"])),
        cluster_queue_size=max(1, len(cluster_queue)),
        optimizer=torch.optim.Adam,
        schedule=lambda step, steps_per_epoch: 1.0,
    ).to(inputs["centres"].dtype)
    nn.init.eye_(backbone.weight)
    with torch.no_grad():
        method.cluster_head.weight.copy_(inputs["centres"])
        method.context_layer.weight.copy_(inputs["context_weight"])
        method.context_layer.bias.copy_(inputs["context_bias"])
    method.key_queue.push(inputs["queue"], torch.arange(len(inputs["queue"])))
    method.cluster_queue.push(cluster_queue, inputs.get("queue_clusters", torch.zeros(0, dtype=torch.int64)))
    return method


def context_gradients(method):
    return {
        "grad_centres": method.cluster_head.weight.grad,
        "grad_context_weight": method.context_layer.weight.grad,
        "grad_context_bias": method.context_layer.bias.grad,
    }


def instance_loss(params, inputs):
    v = inputs["v"].clone().requires_grad_()
    method = make_method(params, inputs, num_features=1)
    logits = method.cluster_logits(v)
    one_direction = [x.unsqueeze(0) for x in (v, logits, inputs["noise"], inputs["keys"])]
    contrast, prior, _ = method.compute_terms_and_fill_queues(*one_direction, torch.arange(len(v)))
    (contrast + prior).backward()
    sample = relaxed_sample(logits, inputs["noise"], temperature=params["gumbel_temperature"])
    return {
        "loss": contrast + prior,
        "contrast": contrast,
        "prior": prior,
        "assignments": logits.softmax(1),
        "sample": sample,
        "query": method.make_queries(v, sample),
        "grad_v": v.grad,
        **context_gradients(method),
    }


def cluster_loss(params, inputs):
    v, logits = inputs["v"].clone().requires_grad_(), inputs["logits"].clone().requires_grad_()
    clusters = sum_by_cluster(v, logits)
    key_clusters = sum_by_cluster(inputs["keys"], inputs["key_logits"])
    loss = cluster_contrast(
        clusters, key_clusters, inputs["queue"], inputs["queue_clusters"], temperature=params["temperature"]
    )
    loss.backward()
    return {
        "loss": loss,
        "clusters": clusters,
        "key_clusters": key_clusters,
        "grad_v": v.grad,
        "grad_logits": logits.grad,
    }


def queue(params, inputs):
    """Return the filled rows of the queue, oldest first: `position` is the slot of the oldest row of a full queue."""
    length, num_features = params["length"], inputs["keys"].shape[-1]
    filled = Queue(size=length, num_features=num_features).to(inputs["keys"].dtype)
    for number, keys in enumerate(inputs["keys"]):
        filled.push(keys, number * len(keys) + torch.arange(len(keys)))
    order = torch.arange(length).roll(-int(filled.position))
    return {"queue": filled.rows[order][filled.indices[order] >= 0]}


def moving_average(params, inputs):
    online = nn.ParameterList([inputs["online"]])
    target = make_target(nn.ParameterList([inputs["target"]]))
    update_target(target, online, params["momentum"])
    return {"target_after": target[0]}


def total(params, inputs):
    h1, h2 = inputs["h1"].clone().requires_grad_(), inputs["h2"]
    method = make_method(params, inputs, num_features=h1.shape[1])
    projector = [method.projector[0].weight, method.projector[0].bias]
    projector += [method.projector[2].weight, method.projector[2].bias]
    names = ["w1", "b1", "w2", "b2"]
    with torch.no_grad():
        for parameter, name in zip(projector, names, strict=True):
            parameter.copy_(inputs[name])
    terms = method.losses(TrainBatch((h1, h2), torch.arange(len(h1)), GivenNoise(inputs["noise"])))
    loss = sum(terms.values())
    loss.backward()
    return {
        "loss": loss,
        "instance": terms["instance"] + terms["prior"],
        "cluster": terms["cluster"],
        "predictions": method.cluster_logits(method.encode(h1)).argmax(1),
        "grad_h1": h1.grad,
        **{f"grad_{name}": parameter.grad for parameter, name in zip(projector, names, strict=True)},
        **context_gradients(method),
    }


ADAPTERS = {
    "instance_loss": instance_loss,
    "cluster_loss": cluster_loss,
    "queue": queue,
    "moving_average": moving_average,
    "total": total,
}
