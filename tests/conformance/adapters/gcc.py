"""GCC: quantities of the authors' code, computed with the functions that training uses."""

import torch
import torch.nn.functional as F
from torch import nn

from deepclust.methods.gcc import (
    GCC,
    FeatureBank,
    assignment_losses,
    degree_weights,
    graph_contrast_loss,
    neighbor_lists,
    pretext_contrast_loss,
)
from deepclust.methods.self_label import self_label_loss
from deepclust.nn.schedules import EpochCosine
from tests.conformance.whole_training.gcc import train_ours
from tests.conformance.whole_training.given import make_adapter


def make_leaves(inputs, *names):
    """Return copies of the named inputs that collect gradients."""
    return [inputs[name].clone().requires_grad_() for name in names]


def read_gradients(**leaves):
    return {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}


def agc_loss(params, inputs):
    anchor, neighbor = make_leaves(inputs, "logits_anchor", "logits_neighbor")
    assignment, balance = assignment_losses(anchor, neighbor)
    loss = assignment + params["entropy_weight"] * balance
    loss.backward()
    outputs = {"loss": loss, "loss_ce": assignment, "loss_ne": balance}
    return outputs | read_gradients(logits_anchor=anchor, logits_neighbor=neighbor)


def rgc_pretext_loss(params, inputs):
    """Return the loss and its gradients from projections, from the features that they become as unit rows, or both."""
    outputs = {}
    for name in ("projections", "features"):
        if name in inputs:
            (leaf,) = make_leaves(inputs, name)
            rows = F.normalize(leaf, dim=2) if name == "projections" else leaf
            outputs["loss"] = pretext_contrast_loss(*rows.unbind(1), temperature=params["temperature"])
            outputs["loss"].backward()
            outputs |= read_gradients(**{name: leaf})
    return outputs


def rgc_graph_loss(params, inputs):
    """Return the loss and its gradients from projections, from features (unit rows), or from both."""
    outputs = {}
    if "neighbor_features" not in inputs:
        inputs = {**inputs, "neighbor_features": F.normalize(inputs["neighbor_projections"], dim=2)}
    for kind in ("projections", "features"):
        names = kind, f"neighbor_{kind}"
        if all(name in inputs for name in names):
            leaves = make_leaves(inputs, *names)
            rows, neighbors = (F.normalize(leaf, dim=2) for leaf in leaves) if kind == "projections" else leaves
            weights, temperature = inputs["neighbor_weights"].to(rows.dtype), params["temperature"]
            outputs["loss"] = graph_contrast_loss(*rows.unbind(1), neighbors, weights, temperature=temperature)
            outputs["loss"].backward()
            outputs |= read_gradients(**dict(zip(names, leaves, strict=True)))
    return outputs


def total_loss(params, inputs):
    backbone = nn.Identity()
    backbone.num_features = 1
    method = GCC(
        backbone=backbone,
        num_images=1,
        num_clusters=inputs["logits_anchor"].shape[1],
        embedding_size=1,
        bank_size=1,
        num_neighbors=1,
        num_positives=1,
        warmup_epochs=0,
        graph_every_n_epochs=1,
        temperature=params["temperature"],
        representation_weight=params["rgc_weight"],
        balance_weight=params["entropy_weight"],
        optimizer=torch.optim.SGD,
        schedule=lambda step, steps_per_epoch: 1.0,
    )
    names = "projections", "neighbor_projections", "logits_anchor", "logits_neighbor"
    projections, neighbors, anchor, neighbor = leaves = make_leaves(inputs, *names)
    rows = F.normalize(torch.cat([projections, neighbors.transpose(0, 1)], 1), dim=2)
    weights = inputs["neighbor_weights"].T.to(rows.dtype)
    loss = sum(method.compute_terms(rows, weights, torch.stack([anchor, neighbor], 1)).values())
    loss.backward()
    return {"loss": loss} | read_gradients(**dict(zip(names, leaves, strict=True)))


def feature_bank_mean(params, inputs):
    pushes = inputs["pushes"]
    bank = FeatureBank(num_images=pushes.shape[1], size=params["size"], num_features=pushes.shape[2]).to(pushes.dtype)
    for rows in pushes:
        bank.push(rows, torch.arange(len(rows)))
    return {"mean": bank.mean()}


def graph_neighbors(params, inputs):
    return {"indices": neighbor_lists(inputs["bank"], params["top"] + 1)}


def graph_weights(params, inputs):
    return {"weights": degree_weights(inputs["indices"], params["num_neighbors"])}


def selflabel_loss(params, inputs):
    (strong,) = make_leaves(inputs, "logits_strong")
    balanced = params["class_balancing"]
    loss, _ = self_label_loss(inputs["logits_weak"], strong, threshold=params["threshold"], balanced=balanced)
    loss.backward()
    return {"loss": loss} | read_gradients(logits_strong=strong)


def cosine_lr(params, inputs):
    schedule = EpochCosine(epochs=params["epochs"], floor=params["lr_decay_rate"] ** 3)
    factors = [schedule(3 * epoch + 1, 3) for epoch in inputs["epoch"].tolist()]
    return {"lr": params["lr"] * torch.tensor(factors, dtype=torch.float64)}


ADAPTERS = {
    "agc_loss": agc_loss,
    "rgc_pretext_loss": rgc_pretext_loss,
    "rgc_graph_loss": rgc_graph_loss,
    "total_loss": total_loss,
    "feature_bank_mean": feature_bank_mean,
    "graph_neighbors": graph_neighbors,
    "graph_weights": graph_weights,
    "selflabel_loss": selflabel_loss,
    "cosine_lr": cosine_lr,
    "whole_training": make_adapter(train_ours),
}
