"""DRC: the values of its formulas, computed with the functions that training uses."""

import torch
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.methods.drc import DRC, feature_contrast, probability_losses


def make_method(params, num_clusters):
    """Return a DRC whose views are the assignment features themselves: backbone and head are identities."""
    backbone = nn.Identity()
    backbone.num_features = num_clusters
    method = DRC(
        backbone=backbone,
        num_clusters=num_clusters,
        feature_temperature=params["temperature_af"],
        probability_temperature=params["temperature_ap"],
        normalize_features=params["normalize_af"],
        normalize_probabilities=params["normalize_ap"],
        balance_weight=params["lambda_cr"],
        balance_batch_size=params["batch_size"],
        optimizer=torch.optim.Adam,
        schedule=lambda step, steps_per_epoch: 1.0,
    )
    method.head = nn.Identity()
    return method


def copy_logits_with_gradients(inputs):
    return inputs["logits_a"].clone().requires_grad_(), inputs["logits_b"].clone().requires_grad_()


def feature(params, inputs):
    a, b = copy_logits_with_gradients(inputs)
    loss = feature_contrast(a, b, temperature=params["temperature"], normalize=params["normalize"])
    loss.backward()
    return {"loss": loss, "grad_logits_a": a.grad, "grad_logits_b": b.grad}


def probability(params, inputs):
    a, b = copy_logits_with_gradients(inputs)
    loss, _ = probability_losses(a, b, temperature=params["temperature"], normalize=params["normalize"])
    loss.backward()
    return {"loss": loss, "grad_logits_a": a.grad, "grad_logits_b": b.grad}


def regulariser(params, inputs):
    a = inputs["logits_a"].clone().requires_grad_()
    _, loss = probability_losses(a, a.detach(), temperature=1.0, normalize=True)
    loss.backward()
    return {"loss": loss, "grad_logits_a": a.grad}


def total(params, inputs):
    a, b = copy_logits_with_gradients(inputs)
    size, clusters = a.shape
    method = make_method({**params, "batch_size": size}, clusters)
    terms = method.losses(TrainBatch((a, b), torch.arange(size), Draws(key=(0,), first_row=0, global_batch_size=size)))
    loss = sum(terms.values())
    loss.backward()
    _, sizes = probability_losses(a, b, temperature=params["temperature_ap"], normalize=params["normalize_ap"])
    return {
        "loss": loss,
        "loss_af": terms["feature"],
        "loss_ap": terms["probability"],
        "loss_cr": sizes,
        "grad_logits_a": a.grad,
        "grad_logits_b": b.grad,
    }


ADAPTERS = {"af_loss": feature, "ap_loss": probability, "cr_loss": regulariser, "total_loss": total}
