"""LNSCC: quantities of the author's code, computed with the functions that training uses."""

import torch
from torch import nn

from deepclust.clustering.neighbor_graph import (
    compute_affinities,
    compute_local_scales,
    compute_multiplicities,
    symmetrize,
)
from deepclust.methods.lnscc import (
    LNSCC,
    balance_loss,
    cluster_divergence,
    fit_similarity_curve,
    pair_losses,
    share_divergence,
    soft_assignments,
    target_distribution,
)
from deepclust.nn.schedules import Constant
from tests.conformance.whole_training.given import make_adapter
from tests.conformance.whole_training.lnscc import train_ours


def make_leaves(inputs, *names):
    """Return copies of the named inputs that collect gradients."""
    return [inputs[name].clone().requires_grad_() for name in names]


def ab_params(params, inputs):
    pairs = zip(inputs["spread"].tolist(), inputs["min_dist"].tolist(), strict=True)
    a, b = zip(*(fit_similarity_curve(min_dist=min_dist, spread=spread) for spread, min_dist in pairs), strict=True)
    return {"a": torch.tensor(a, dtype=torch.float64), "b": torch.tensor(b, dtype=torch.float64)}


def local_scales(params, inputs):
    rho, sigma = compute_local_scales(inputs["dist"])
    return {"rho": rho, "sigma": sigma}


def affinity_graph(params, inputs):
    indices, distances = inputs["idx"], inputs["dist"]
    return {"W": symmetrize(indices, compute_affinities(indices, distances, *compute_local_scales(distances))).dense()}


def edge_multiplicity(params, inputs):
    return {"count": compute_multiplicities(inputs["W"], max_multiplicity=params["n_epochs"])}


def pair_loss(params, inputs):
    z_i, z_j = make_leaves(inputs, "z_i", "z_j")
    permutation = inputs["perm"]
    positive, negative = pair_losses(
        z_i, z_j, permutation, a=params["a"], b=params["b"], negative_weight=params["negative_force"]
    )
    loss = (positive + negative) / (len(z_i) + len(permutation))
    loss.backward()
    return {
        "loss": loss,
        "loss_pos": positive / len(z_i),
        "loss_neg": negative / len(permutation),
        "grad_z_i": z_i.grad,
        "grad_z_j": z_j.grad,
    }


def soft_assign(params, inputs):
    return {"q": soft_assignments(inputs["z"], inputs["mu"])}


def target_distribution_of_batch(params, inputs):
    return {"p": target_distribution(inputs["q"])}


def cluster_kl(params, inputs):
    z, mu = make_leaves(inputs, "z", "mu")
    loss = cluster_divergence(soft_assignments(z, mu))
    loss.backward()
    return {"loss": loss, "grad_z": z.grad, "grad_mu": mu.grad}


def balance_loss_of_batch(params, inputs):
    z, mu = make_leaves(inputs, "z", "mu")
    loss = balance_loss(soft_assignments(z, mu), inputs["desired"])
    loss.backward()
    return {"loss": loss, "grad_z": z.grad, "grad_mu": mu.grad}


def total_loss(params, inputs):
    z_i, z_j = make_leaves(inputs, "z_i", "z_j")
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
    loss = sum(method.compute_terms(z_i, z_j, inputs["perm"]).values())
    loss.backward()
    return {"loss": loss, "grad_z_i": z_i.grad, "grad_z_j": z_j.grad, "grad_mu": method.centres.grad}


def centre_choice(params, inputs):
    kl = share_divergence(inputs["counts"], inputs["desired"])
    return {"kl": kl, "best": kl.argmin()}


ADAPTERS = {
    "ab_params": ab_params,
    "local_scales": local_scales,
    "affinity_graph": affinity_graph,
    "edge_multiplicity": edge_multiplicity,
    "pair_loss": pair_loss,
    "soft_assign": soft_assign,
    "target_distribution": target_distribution_of_batch,
    "cluster_kl": cluster_kl,
    "balance_loss": balance_loss_of_batch,
    "total_loss": total_loss,
    "centre_choice": centre_choice,
    "whole_training": make_adapter(train_ours),
}
