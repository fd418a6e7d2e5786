"""Precise feature: quantities of the authors' code, computed with the functions that training uses."""

import math
from functools import partial

import torch

from deepclust.backbones.strided_convolutions import ConditionalGenerator, StridedConvNet
from deepclust.methods.precise_feature import (
    PreciseFeature,
    class_weight,
    code_cross_entropy,
    count_updates,
    gradient_penalty,
)
from deepclust.metrics import ContingencyTable, compute_scores
from deepclust.nn.schedules import Constant


def make_method(params, inputs):
    """Return a method whose networks have the sizes of a case, in the dtype of its weights."""
    widths = []
    while (name := f"critic_conv{len(widths) + 1}_weight") in inputs:
        widths.append(len(inputs[name]))
    channels = inputs["critic_conv1_weight"].shape[1]
    num_clusters, noise_size = len(inputs["class_out_bias"]), inputs["noise"].shape[1]
    image_size = math.isqrt(inputs["real"].shape[1] // channels)
    sizes = {"channels": channels, "image_size": image_size, "widths": widths}
    return PreciseFeature(
        backbone=StridedConvNet(**sizes),
        critic=StridedConvNet(**sizes),
        generator=ConditionalGenerator(noise_size=noise_size, num_clusters=num_clusters, **sizes),
        num_clusters=num_clusters,
        critic_outputs=len(inputs["critic_out_bias"]),
        penalty_weight=params["penalty_weight"],
        critic_updates=1,
        classifier_updates=1,
        doubled_from=None,
        class_weight_growth=1.0,
        class_weight_every=1,
        class_weight_max=None,
        optimizer=partial(torch.optim.Adam, lr=1.0),
        schedule=Constant(),
    ).to(inputs["real"].dtype)


def name_parameters(method):
    """Return the parameters of a method by the names that the cases give them."""
    layers = {"gen_in": method.generator.input, "critic_out": method.critic[1], "class_out": method.classifier}
    layers |= {f"gen_deconv{n}": layer for n, layer in enumerate(method.generator.layers, start=1)}
    for prefix, network in (("critic", method.critic[0]), ("class", method.backbone)):
        convolutions = [layer for layer in network.layers if isinstance(layer, torch.nn.Conv2d)]
        layers |= {f"{prefix}_conv{n}": layer for n, layer in enumerate(convolutions, start=1)}
    return {f"{name}_{kind}": getattr(layer, kind) for name, layer in layers.items() for kind in ("weight", "bias")}


def gan_losses(params, inputs):
    method = make_method(params, inputs)
    parameters = name_parameters(method)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(inputs[name])
    noise, codes = inputs["noise"], inputs["codes"]
    channels = inputs["critic_conv1_weight"].shape[1]
    side = math.isqrt(inputs["real"].shape[1] // channels)
    real = inputs["real"].unflatten(1, (channels, side, side))
    generated = method.generate(noise, codes)

    difference, penalty = method.compute_critic_terms(real, noise, codes, inputs["mix"])
    class_loss = method.compute_classifier_term(noise, codes)
    realism, cross_entropy = method.compute_generator_terms(noise, codes)
    losses = {
        "critic": difference + method.penalty_weight * penalty,
        "class": class_loss,
        "gen": realism + params["class_weight"] * cross_entropy,
    }
    gradients = {}
    for prefix, loss in losses.items():
        own = {name: p for name, p in parameters.items() if name.startswith(f"{prefix}_")}
        found = torch.autograd.grad(loss, list(own.values()), retain_graph=True)
        gradients |= {f"grad_{name}": gradient for name, gradient in zip(own, found, strict=True)}
    return gradients | {
        "fake": generated.flatten(1),
        "critic_real": method.critic(real),
        "critic_fake": method.critic(generated),
        "class_logits_fake": method.classify(generated),
        "class_logits_real": method.cluster_logits(method.encode(real)),
        "gradient_penalty": penalty,
        "critic_loss": losses["critic"],
        "class_loss": losses["class"],
        "generator_loss": losses["gen"],
    }


def batch_evaluation(params, inputs):
    predicted, labels = inputs["predicted"], inputs["labels"]
    table = ContingencyTable(num_clusters=int(predicted.max()) + 1, num_classes=int(labels.max()) + 1)
    table.update(predicted, labels)
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in compute_scores(table.compute()).items()}


def schedule(params, inputs):
    updates, weights = [], []
    for iteration in inputs["iteration"].tolist():
        counts = count_updates(
            iteration,
            critic_updates=params.get("critic_updates", 5),
            classifier_updates=params.get("classifier_updates", 2),
            doubled_from=params["iterations"] // 3,
        )
        updates.append(counts)
        weights.append(class_weight(iteration, growth=params["decay_rate"], every=params["decay_steps"], maximum=None))
    names = ("generator_updates", "critic_updates", "classifier_updates")
    outputs = dict(zip(names, torch.tensor(updates).unbind(1), strict=True))
    return outputs | {"class_weight": torch.tensor(weights, dtype=torch.float64)}


def penalty_of_small_critic(params, inputs):
    a, b = inputs["a"].clone().requires_grad_(), inputs["b"].clone().requires_grad_()
    penalty = gradient_penalty(lambda x: (x @ a.T).tanh() @ b.T, inputs["real"], inputs["fake"], inputs["mix"])
    penalty.backward()
    return {"penalty": penalty, "grad_a": a.grad, "grad_b": b.grad}


def code_entropy_bound(params, inputs):
    logits = inputs["logits"].clone().requires_grad_()
    loss = code_cross_entropy(logits, inputs["codes"])
    loss.backward()
    return {"loss": loss, "grad_logits": logits.grad}


ADAPTERS = {
    "gan_losses": gan_losses,
    "batch_evaluation": batch_evaluation,
    "schedule": schedule,
    "gradient_penalty": penalty_of_small_critic,
    "code_entropy_bound": code_entropy_bound,
}
