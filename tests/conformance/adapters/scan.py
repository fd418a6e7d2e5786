"""SCAN: quantities of the authors' code, computed by what training uses."""

import torch

from deepclust.methods.scan import SMALLEST_SHARE, entropy, pretext_loss, scan_losses, selection_losses
from deepclust.methods.self_label import class_weights, confident, self_label_loss
from deepclust.nn.schedules import EpochCosine


def free(inputs, *names):
    """The named inputs as variables of their own."""
    return [inputs[name].clone().requires_grad_() for name in names]


def clustering(params, inputs):
    """Of one head (N, K), or of several (H, N, K)."""
    anchors, neighbors = free(inputs, "anchors", "neighbors")
    consistency, entropies = scan_losses(anchors, neighbors)
    totals = consistency - params["entropy_weight"] * entropies
    totals.sum().backward()
    found = {"total": totals.sum(), "grad_anchors": anchors.grad, "grad_neighbors": neighbors.grad}
    if anchors.dim() == 2:
        return found | {"consistency": consistency, "entropy": entropies}
    return found | {
        "per_head_total": totals,
        "per_head_consistency": consistency,
        "per_head_entropy": entropies,
    }


def entropy_of_rows(params, inputs):
    """Mean entropy of distributions, or of logits, of which the authors' code clamps nothing (nor does training)."""
    assert params["clamp"] == SMALLEST_SHARE
    (x,) = free(inputs, "x")
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


def self_labelling(params, inputs):
    weak = inputs["weak"]
    (strong,) = free(inputs, "strong")
    threshold, balanced = params["threshold"], params["class_balancing"]
    loss, share = self_label_loss(weak, strong, threshold=threshold, balanced=balanced)
    loss.backward()
    target, mask = confident(weak, threshold=threshold)
    assert share == mask.float().mean()
    weights = class_weights(target, mask, like=strong.detach())
    return {
        "loss": loss,
        "grad_strong": strong.grad,
        "mask": mask,
        "target": target,
        "class_weight": weights if balanced else torch.ones_like(weights),
    }


def pretext(params, inputs):
    (features,) = free(inputs, "features")
    loss = pretext_loss(*features.unbind(1), temperature=params["temperature"])
    loss.backward()
    return {"loss": loss, "grad_features": features.grad}


def pretext_rate(params, inputs):
    schedule = EpochCosine(epochs=params["epochs"], floor=params["decay_rate"] ** 3)
    steps = 7  # an epoch; the rate is held in it
    first, last = (
        [params["base_lr"] * schedule(epoch * steps + step, steps) for epoch in inputs["epoch"].tolist()]
        for step in (1, steps)
    )
    assert first == last
    return {"lr": torch.tensor(first, dtype=torch.float64)}


ADAPTERS = {
    "scan_loss": clustering,
    "scan_loss_multihead": clustering,
    "entropy": entropy_of_rows,
    "head_selection": head_selection,
    "selflabel_loss": self_labelling,
    "pretext_simclr_loss": pretext,
    "pretext_lr_schedule": pretext_rate,
}
