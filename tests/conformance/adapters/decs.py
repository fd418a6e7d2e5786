"""DECS: quantities of the authors' code, computed with the functions that training uses."""

from functools import partial

import torch
from torch import nn

from deepclust.backbones.conv_autoencoder import ConvDecoder, ConvEncoder
from deepclust.methods.decs import DECS, compute_determinacies, compute_stabilities, otsu_threshold
from deepclust.nn.schedules import Constant
from tests.conformance.adapters.dec import make_leaves


def make_method(params, *, num_features, num_clusters):
    """Return DECS with the numbers of the case."""
    backbone = nn.Identity()
    backbone.num_features = num_features
    return DECS(
        backbone=backbone,
        decoder=nn.Identity(),
        num_clusters=num_clusters,
        alpha=params.get("alpha", 0.5),
        threshold_bins=params.get("bins", 1000),
        determinacy="linear",
        variance_weight=params["variance_weight"],
        batch_variance_weight=1.0,
        reconstruction_weight=0.0,
        shuffle=False,
        kmeans_restarts=1,
        kmeans_max_iterations=1,
        kmeans_tolerance=0.0,
        optimizer=partial(torch.optim.SGD, lr=0.0),
        schedule=Constant(),
    )


def threshold_of_batch(params, inputs):
    return {"t": otsu_threshold(inputs["q"], num_bins=params["bins"])}


def stability_loss(params, inputs):
    (q,) = make_leaves(inputs, "q")
    determinacies = compute_determinacies(q, inputs["t"], form="linear")
    stabilities = compute_stabilities(determinacies, variance_weight=params["variance_weight"])
    method = make_method(params, num_features=1, num_clusters=q.shape[1])
    loss = sum(method.weigh_terms(stabilities).values())
    loss.backward()
    return {"determinacy": determinacies, "stability": stabilities, "loss": loss, "grad_q": q.grad}


def batch(params, inputs):
    z, centres = make_leaves(inputs, "z_train", "centres")
    method = make_method(params, num_features=z.shape[1], num_clusters=len(centres)).to(z.dtype)
    del method.centres  # a parameter; the centres of the case collect its gradients
    method.centres = centres
    loss = sum(method.compute_terms(z, inputs["z_eval"]).values())
    loss.backward()
    return {
        "t": method.threshold,
        "q": method.compute_logits(z).softmax(1),
        "loss": loss,
        "grad_z_train": z.grad,
        "grad_centres": centres.grad,
    }


def autoencoder_forward(params, inputs):
    x = inputs["x"]
    *widths, num_features = params["filters"]
    sizes = {"channels": x.shape[1], "image_size": params["side"], "widths": widths, "num_features": num_features}
    encoder, decoder = ConvEncoder(**sizes).to(x.dtype), ConvDecoder(**sizes).to(x.dtype)
    layers = [layer for network in (encoder, decoder) for layer in network.layers]
    norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
    weighted = [layer for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    names = [*(f"conv{i + 1}" for i in range(len(widths))), "embed", "expand"]
    names += [f"deconv{i}" for i in reversed(range(len(widths)))]
    with torch.no_grad():
        for name, layer in zip(names, weighted, strict=True):
            layer.weight.copy_(inputs[f"{name}_weight"])
            layer.bias.copy_(inputs[f"{name}_bias"])
        for number, layer in enumerate(norms):
            layer.weight.copy_(inputs[f"bn{number}_weight"])
            layer.bias.copy_(inputs[f"bn{number}_bias"])
            layer.running_mean.copy_(inputs[f"bn{number}_mean"])
            layer.running_var.copy_(inputs[f"bn{number}_var"])
    embedding = encoder.eval()(x)
    return {
        "embedding": embedding,
        "reconstruction": decoder.eval()(embedding),
        "embedding_train": encoder.train()(x),
    }


ADAPTERS = {
    "otsu_threshold": threshold_of_batch,
    "stability_loss": stability_loss,
    "decs_batch": batch,
    "autoencoder_forward": autoencoder_forward,
}
