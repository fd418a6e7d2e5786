"""LNSCC: quantities of the author's code, computed by what training uses."""

import torch
from torch import nn

from deepclust.clustering.neighbor_graph import affinities, local_scales, multiplicities, union
from deepclust.methods.lnscc import (
    LNSCC,
    balance_loss,
    cluster_divergence,
    pair_costs,
    share_divergence,
    sharpened,
    similarity_curve,
    soft_assignments,
)
from deepclust.nn.schedules import Constant


def free(inputs, *names):
    """The named inputs as variables of their own."""
    return [inputs[name].clone().requires_grad_() for name in names]


def curve(params, inputs):
    pairs = zip(inputs["spread"].tolist(), inputs["min_dist"].tolist(), strict=True)
    a, b = zip(*(similarity_curve(min_dist=min_dist, spread=spread) for spread, min_dist in pairs), strict=True)
    return {"a": torch.tensor(a, dtype=torch.float64), "b": torch.tensor(b, dtype=torch.float64)}


def scales(params, inputs):
    rho, sigma = local_scales(inputs["dist"])
    return {"rho": rho, "sigma": sigma}


def graph(params, inputs):
    indices, distances = inputs["idx"], inputs["dist"]
    return {"W": union(indices, affinities(indices, distances, *local_scales(distances))).dense()}


def edges(params, inputs):
    return {"count": multiplicities(inputs["W"], most=params["n_epochs"])}


def pairs(params, inputs):
    z_i, z_j = free(inputs, "z_i", "z_j")
    order = inputs["perm"]
    joined, random = pair_costs(z_i, z_j, order, a=params["a"], b=params["b"], negative_weight=params["negative_force"])
    loss = (joined + random) / (len(z_i) + len(order))
    loss.backward()
    return {
        "loss": loss,
        "loss_pos": joined / len(z_i),
        "loss_neg": random / len(order),
        "grad_z_i": z_i.grad,
        "grad_z_j": z_j.grad,
    }


def assign(params, inputs):
    return {"q": soft_assignments(inputs["z"], inputs["mu"])}


def target(params, inputs):
    return {"p": sharpened(inputs["q"])}


def divergence(params, inputs):
    z, mu = free(inputs, "z", "mu")
    loss = cluster_divergence(soft_assignments(z, mu))
    loss.backward()
    return {"loss": loss, "grad_z": z.grad, "grad_mu": mu.grad}


def balance(params, inputs):
    z, mu = free(inputs, "z", "mu")
    loss = balance_loss(soft_assignments(z, mu), inputs["desired"])
    loss.backward()
    return {"loss": loss, "grad_z": z.grad, "grad_mu": mu.grad}


def total(params, inputs):
    z_i, z_j = free(inputs, "z_i", "z_j")
    backbone = nn.Identity()
    backbone.num_features = z_i.shape[1]
    method = LNSCC(
        backbone=backbone,
        num_clusters=len(inputs["mu"]),
        num_neighbors=2,
        max_multiplicity=200,
        min_dist=0.1,
        spread=1.0,
        negatives=params["negatives"],
        negative_weight=params["negative_force"],
        cluster_weight=params["lambda_c"],
        balance_weight=params["lambda_b"],
        cluster_shares=None,
        centres_after_epochs=0,
        clustering_after_epochs=0,
        kmeans_runs=1,
        kmeans_max_iterations=1,
        kmeans_tolerance=0.0,
        optimizer=torch.optim.Adam,
        schedule=Constant(),
    ).to(z_i.dtype)
    method.a, method.b = params["a"], params["b"]
    with torch.no_grad():
        method.centres.copy_(inputs["mu"])
    loss = sum(method.objective(z_i, z_j, inputs["perm"]).values())
    loss.backward()
    return {"loss": loss, "grad_z_i": z_i.grad, "grad_z_j": z_j.grad, "grad_mu": method.centres.grad}


def choice(params, inputs):
    kl = share_divergence(inputs["counts"], inputs["desired"])
    return {"kl": kl, "best": kl.argmin()}


ADAPTERS = {
    "ab_params": curve,
    "local_scales": scales,
    "affinity_graph": graph,
    "edge_multiplicity": edges,
    "pair_loss": pairs,
    "soft_assign": assign,
    "target_distribution": target,
    "cluster_kl": divergence,
    "balance_loss": balance,
    "total_loss": total,
    "centre_choice": choice,
}
