"""GCC: quantities of the authors' code, computed by what training uses."""

import torch
import torch.nn.functional as F
from torch import nn

from deepclust.methods.gcc import (
    GCC,
    FeatureBank,
    assignment_losses,
    degree_weights,
    graph_contrast,
    neighbor_lists,
    pretext_contrast,
)
from deepclust.nn.schedules import EpochCosine


def free(inputs, *names):
    """The named inputs as variables of their own."""
    return [inputs[name].clone().requires_grad_() for name in names]


def gradients(**variables):
    return {f"grad_{name}": variable.grad for name, variable in variables.items()}


def agc(params, inputs):
    anchor, neighbor = free(inputs, "logits_anchor", "logits_neighbor")
    assignment, balance = assignment_losses(anchor, neighbor)
    loss = assignment + params["entropy_weight"] * balance
    loss.backward()
    outputs = {"loss": loss, "loss_ce": assignment, "loss_ne": balance}
    return outputs | gradients(logits_anchor=anchor, logits_neighbor=neighbor)


def pretext(params, inputs):
    projections, features = free(inputs, "projections", "features")
    for rows in (F.normalize(projections, dim=2), features):
        loss = pretext_contrast(*rows.unbind(1), temperature=params["temperature"])
        loss.backward()
    return {"loss": loss} | gradients(projections=projections, features=features)


def graph(params, inputs):
    projections, features, neighbor_projections = free(inputs, "projections", "features", "neighbor_projections")
    neighbor_features = F.normalize(neighbor_projections.detach(), dim=2).requires_grad_()
    views = F.normalize(projections, dim=2), F.normalize(neighbor_projections, dim=2)
    for rows, neighbors in (views, (features, neighbor_features)):
        weights = inputs["neighbor_weights"].to(projections.dtype)
        loss = graph_contrast(*rows.unbind(1), neighbors, weights, temperature=params["temperature"])
        loss.backward()
    return {"loss": loss} | gradients(
        projections=projections,
        features=features,
        neighbor_projections=neighbor_projections,
        neighbor_features=neighbor_features,
    )


def total(params, inputs):
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
    projections, neighbors, anchor, neighbor = variables = free(inputs, *names)
    rows = F.normalize(torch.cat([projections, neighbors.transpose(0, 1)], 1), dim=2)
    weights = inputs["neighbor_weights"].T.to(rows.dtype)
    loss = sum(method.terms(rows, weights, torch.stack([anchor, neighbor], 1)).values())
    loss.backward()
    return {"loss": loss} | gradients(**dict(zip(names, variables, strict=True)))


def bank(params, inputs):
    pushes = inputs["pushes"]
    held = FeatureBank(num_images=pushes.shape[1], size=params["size"], num_features=pushes.shape[2]).to(pushes.dtype)
    for rows in pushes:
        held.push(rows, torch.arange(len(rows)))
    return {"mean": held.mean()}


def lists(params, inputs):
    return {"indices": neighbor_lists(inputs["bank"], params["top"] + 1)}


def weights(params, inputs):
    return {"weights": degree_weights(inputs["indices"], params["num_neighbors"])}


def self_label(params, inputs):
    from deepclust.methods.self_label import self_label_loss

    (strong,) = free(inputs, "logits_strong")
    balanced = params["class_balancing"]
    loss, _ = self_label_loss(inputs["logits_weak"], strong, threshold=params["threshold"], balanced=balanced)
    loss.backward()
    return {"loss": loss} | gradients(logits_strong=strong)


def rate(params, inputs):
    schedule = EpochCosine(epochs=params["epochs"], floor=params["lr_decay_rate"] ** 3)
    factors = [schedule(3 * epoch + 1, 3) for epoch in inputs["epoch"].tolist()]
    return {"lr": params["lr"] * torch.tensor(factors, dtype=torch.float64)}


ADAPTERS = {
    "agc_loss": agc,
    "rgc_pretext_loss": pretext,
    "rgc_graph_loss": graph,
    "total_loss": total,
    "feature_bank_mean": bank,
    "graph_neighbors": lists,
    "graph_weights": weights,
    "selflabel_loss": self_label,
    "cosine_lr": rate,
}
