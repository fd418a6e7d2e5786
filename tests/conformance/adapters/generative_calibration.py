"""Generative calibration: quantities of diffusers and of our formulas, computed with the functions of training."""

import torch

from deepclust.losses.kernel_means import kernel_mean_distances
from deepclust.methods.generative_calibration import (
    class_matching_loss,
    class_separation_loss,
    reliability,
    reliable_metric_loss,
)
from deepclust.nn import conditional_diffusion


def make_alphas_cumprod(params):
    return conditional_diffusion.linear_alphas_cumprod(
        params["num_steps"], beta_start=params["beta_start"], beta_end=params["beta_end"]
    )


def noising(params, inputs):
    alphas_cumprod = make_alphas_cumprod(params)[inputs["t"]]
    x_t = conditional_diffusion.add_noise(inputs["x_0"], inputs["noise"], alphas_cumprod)
    return {"alphas_cumprod": alphas_cumprod, "x_t": x_t}


def ddim_step(params, inputs):
    x_0, x_previous = conditional_diffusion.ddim_step(
        inputs["x_t"],
        inputs["noise"],
        make_alphas_cumprod(params),
        step=params["t"],
        stride=params["num_steps"] // params["num_sampling_steps"],
        limit=None,
    )
    return {"x_0": x_0, "x_previous": x_previous}


def guided_noise(params, inputs):
    noise = conditional_diffusion.guided_noise(
        inputs["conditional"], inputs["unconditional"], guidance=params["guidance"]
    )
    return {"noise": noise}


def loss_of_kernel_distances(params, inputs, compute_loss):
    real, generated = (inputs[name].clone().requires_grad_() for name in ("real", "generated"))
    distances, counts, width = kernel_mean_distances(
        *(real, inputs["labels"], generated, inputs["codes"]),
        num_clusters=params["num_clusters"],
        width_factors=params["bandwidth_factors"],
    )
    loss = compute_loss(distances, counts)
    grad_real, grad_generated = torch.autograd.grad(loss, [real, generated])
    return {"loss": loss, "grad_real": grad_real, "grad_generated": grad_generated, "width": width}


def class_matching(params, inputs):
    return loss_of_kernel_distances(params, inputs, class_matching_loss)


def class_separation(params, inputs):
    return loss_of_kernel_distances(
        params, inputs, lambda distances, counts: class_separation_loss(distances, counts, margin=params["margin"])
    )


def reliable_metric(params, inputs):
    generated, real = (inputs[name].clone().requires_grad_() for name in ("generated", "real"))
    weights = reliability(inputs["logits"], inputs["codes"])
    loss = reliable_metric_loss(
        *(generated, inputs["codes"], weights, real, inputs["labels"]), temperature=params["temperature"]
    )
    grad_generated, grad_real = torch.autograd.grad(loss, [generated, real])
    return {"reliability": weights, "loss": loss, "grad_generated": grad_generated, "grad_real": grad_real}


ADAPTERS = {
    "noising": noising,
    "ddim_step": ddim_step,
    "guided_noise": guided_noise,
    "class_matching": class_matching,
    "class_separation": class_separation,
    "reliable_metric": reliable_metric,
}
