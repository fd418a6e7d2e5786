"""Hard regularisation: quantities of the authors' code, computed with the functions that training uses."""

from functools import partial

import torch
from torch import nn

from deepclust.backbones.lenet import LeNet
from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.balanced_assignment import cluster_sizes
from deepclust.clustering.greedy_assignment import greedy_log_count
from deepclust.clustering.sinkhorn import sinkhorn_assignments
from deepclust.methods.hard_regularization import (
    HardRegularization,
    assigned_cost,
    size_divergence,
    soft_balance_terms,
)
from deepclust.nn.schedules import Constant

KINDS = {  # of soft regularisers, in the cases and here
    "var": "mean_square",
    "var_improved": "variance",
    "entropy": "entropy",
    "entropy_nearest": "entropy_nearest",
}


def make_method(params, centroids, *, backbone=None, balance="log_count"):
    """Return a method with these centroids (K, D), in their dtype."""
    if backbone is None:
        backbone = nn.Identity()
        backbone.num_features = 1
    method = HardRegularization(
        backbone=backbone,
        num_clusters=len(centroids),
        embedding_size=centroids.shape[1],
        sigma=params.get("sigma", 1.0),
        balance=balance,
        count_over="batch",
        prior=None,
        sinkhorn_epsilon=1.0,
        sinkhorn_iterations=1,
        optimizer=partial(torch.optim.Adam, lr=params.get("lr", 1.0)),
        schedule=Constant(),
    ).to(centroids.dtype)
    with torch.no_grad():
        method.centroids.copy_(centroids)
    return method


def train_on_embeddings(method, embeddings, assign):
    """Return assignments by `assign` from costs, and the loss on embeddings with its gradients."""
    embeddings = embeddings.clone().requires_grad_()
    costs = method.compute_costs(embeddings)
    labels = assign(costs.detach())
    loss = assigned_cost(costs, labels)
    loss.backward()
    return {
        "labels": labels,
        "loss": loss,
        "grad_embeddings": embeddings.grad,
        "grad_centroids": method.centroids.grad,
    }


def assign_batch(params, inputs):
    method = make_method(params, inputs["centroids"])
    before = inputs.get("counts_before", torch.zeros(len(inputs["centroids"]), dtype=torch.int64))

    def assign(costs):
        return greedy_log_count(costs - inputs["log_prior"] if "log_prior" in inputs else costs, before)

    plain = not {"counts_before", "log_prior"} & inputs.keys()
    outputs = train_on_embeddings(method, inputs["embeddings"], method.assign if plain else assign)
    return outputs | {"counts": before + cluster_sizes(outputs["labels"], before)}


def assign_nearest(params, inputs):
    method = make_method(params, inputs["centroids"], balance="none")
    return train_on_embeddings(method, inputs["embeddings"], method.assign)


def predict(params, inputs):
    method = make_method(params, inputs["centroids"])
    return {"labels": method.cluster_logits(inputs["embeddings"]).argmax(1)}


def sinkhorn(params, inputs):
    assignments = sinkhorn_assignments(inputs["scores"], epsilon=params["epsilon"], iterations=params["iterations"])
    return {"assignments": assignments}


def soft_regulariser(params, inputs):
    costs = inputs["costs"].clone().requires_grad_()
    loss = sum(soft_balance_terms(costs, KINDS[params["kind"]]))
    loss.backward()
    return {"loss": loss, "grad_costs": costs.grad}


def divergence(params, inputs):
    return {"divergence": size_divergence(inputs["sizes"], inputs["prior"])}


def train_steps(params, inputs):
    images = [inputs[name] for name in sorted(name for name in inputs if name.startswith("images_"))]
    channels, image_size = images[0].shape[1:3]
    widths, kernel_size = [len(inputs["conv1"]), len(inputs["conv2"])], inputs["conv1"].shape[3]
    backbone = LeNet(
        channels=channels, image_size=image_size, widths=widths, kernel_size=kernel_size, pool_after=[1, 2]
    )
    method = make_method(params, inputs["centroids"], backbone=backbone)
    conv1, bn1, conv2, bn2 = (backbone.layers[i] for i in (0, 1, 4, 5))
    layers = {"conv1": conv1, "bn1": bn1, "conv2": conv2, "bn2": bn2, "linear": method.projector}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(inputs[name])
            layer.bias.copy_(inputs[f"{name}_bias"])
    embeddings = []
    method.projector.register_forward_hook(lambda layer, given, output: embeddings.append(output))
    optimizer = method.make_optimizer(method.parameter_groups())
    outputs = {}
    for step, views in enumerate(images):
        optimizer.zero_grad()
        draws = Draws(key=(0,), first_row=0, global_batch_size=len(views))
        loss = sum(method.losses(TrainBatch((views,), torch.arange(len(views)), draws)).values())
        loss.backward()
        outputs |= {
            f"embeddings_{step}": embeddings[-1],
            f"labels_{step}": method.assign(method.compute_costs(embeddings[-1])),
            f"loss_{step}": loss,
        }
        gradients = {name: layer.weight.grad for name, layer in layers.items()}
        gradients["centroids"] = method.centroids.grad
        if step == 0:
            outputs |= {f"grad_{name}": gradient.clone() for name, gradient in gradients.items()}
        optimizer.step()
    after = {"centroids": method.centroids, "running_var": bn2.running_var}
    after |= {name: layer.weight for name, layer in layers.items()}
    after |= {f"{name}_bias": layer.bias for name, layer in layers.items()}
    return outputs | {f"{name}_after": values for name, values in after.items()}


ADAPTERS = {
    "assign_batch": assign_batch,
    "assign_nearest": assign_nearest,
    "predict": predict,
    "sinkhorn": sinkhorn,
    "soft_regulariser": soft_regulariser,
    "size_divergence": divergence,
    "train_steps": train_steps,
}
