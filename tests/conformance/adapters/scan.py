"""SCAN: quantities of the authors' code, computed with the functions that training uses."""

import torch

from deepclust.methods.scan import SMALLEST_SHARE, entropy, pretext_loss, scan_losses, selection_losses
from deepclust.methods.self_label import class_weights, confident_pseudo_labels, self_label_loss
from deepclust.nn.schedules import EpochCosine
from tests.conformance.whole_training.given import make_adapter
from tests.conformance.whole_training.scan import train_ours


def make_leaves(inputs, *names):
    """Return copies of the named inputs that collect gradients."""
    return [inputs[name].clone().requires_grad_() for name in names]


def scan_loss(params, inputs):
    """Return the losses of one head (N, K) or of several (H, N, K)."""
    anchors, neighbors = make_leaves(inputs, "anchors", "neighbors")
    consistency, entropies = scan_losses(anchors, neighbors)
    totals = consistency - params["entropy_weight"] * entropies
    totals.sum().backward()
    outputs = {"total": totals.sum(), "grad_anchors": anchors.grad, "grad_neighbors": neighbors.grad}
    if anchors.dim() == 2:
        return outputs | {"consistency": consistency, "entropy": entropies}
    return outputs | {
        "per_head_total": totals,
        "per_head_consistency": consistency,
        "per_head_entropy": entropies,
    }


def mean_entropy(params, inputs):
    """Return the mean entropy of distributions, or of logits, for which neither the authors nor training clamp."""
    assert params["clamp"] == SMALLEST_SHARE
    (x,) = make_leaves(inputs, "x")
    if params["input_as_probabilities"]:
        value = entropy(x).mean()
    else:
        value = torch.distributions.Categorical(logits=x).entropy().mean()
    value.backward()
    return {"entropy": value, "grad_x": x.grad}


def head_selection(params, inputs):
    consistency, entropies = selection_losses(inputs["probabilities"], inputs["neighbors"])
    total = consistency - entropies
    return {"consistency": consistency, "entropy": entropies, "total": total, "best_head": total.argmin()}


def selflabel_loss(params, inputs):
    weak = inputs["weak"]
    (strong,) = make_leaves(inputs, "strong")
    threshold, balanced = params["threshold"], params["class_balancing"]
    loss, share = self_label_loss(weak, strong, threshold=threshold, balanced=balanced)
    loss.backward()
    target, mask = confident_pseudo_labels(weak, threshold=threshold)
    assert share == mask.float().mean()
    weights = class_weights(target, mask, like=strong.detach())
    return {
        "loss": loss,
        "grad_strong": strong.grad,
        "mask": mask,
        "target": target,
        "class_weight": weights if balanced else torch.ones_like(weights),
    }


def pretext_simclr_loss(params, inputs):
    (features,) = make_leaves(inputs, "features")
    loss = pretext_loss(*features.unbind(1), temperature=params["temperature"])
    loss.backward()
    return {"loss": loss, "grad_features": features.grad}


def pretext_lr_schedule(params, inputs):
    schedule = EpochCosine(epochs=params["epochs"], floor=params["decay_rate"] ** 3)
    steps = 7  # per epoch, all with the same rate
    first, last = (
        [params["base_lr"] * schedule(epoch * steps + step, steps) for epoch in inputs["epoch"].tolist()]
        for step in (1, steps)
    )
    assert first == last
    return {"lr": torch.tensor(first, dtype=torch.float64)}


ADAPTERS = {
    "scan_loss": scan_loss,
    "scan_loss_multihead": scan_loss,
    "entropy": mean_entropy,
    "head_selection": head_selection,
    "selflabel_loss": selflabel_loss,
    "pretext_simclr_loss": pretext_simclr_loss,
    "pretext_lr_schedule": pretext_lr_schedule,
    "whole_training": make_adapter(train_ours),
}
