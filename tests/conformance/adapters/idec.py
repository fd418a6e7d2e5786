"""IDEC: quantities of the authors' code, computed with the functions that training uses."""

from functools import partial

import torch

from tests.conformance.adapters.dec import fit, make_leaves, make_method


def idec_loss(params, inputs):
    z, centres, reconstruction = make_leaves(inputs, "z", "centres", "reconstruction")
    backbone = torch.nn.Identity()
    backbone.num_features = z.shape[1]
    method = make_method(
        params,
        backbone=backbone,
        decoder=torch.nn.Identity(),
        num_images=len(z),
        num_clusters=len(centres),
        reconstruction_weight=1.0,
        clustering_weight=1.0,
    )
    del method.centres  # a parameter; the centres of the case collect its gradients
    method.centres = centres
    unweighted = method.compute_terms(z, inputs["p"], inputs["x"], reconstruction)["clustering"].detach()
    method.clustering_weight = params["clustering_weight"]
    terms = method.compute_terms(z, inputs["p"], inputs["x"], reconstruction)
    loss = terms["clustering"] + terms["reconstruction"]
    loss.backward()
    return {
        "clustering": unweighted,
        "reconstruction_loss": terms["reconstruction"],
        "loss": loss,
        "grad_z": z.grad,
        "grad_centres": centres.grad,
        "grad_reconstruction": reconstruction.grad,
    }


ADAPTERS = {"idec_loss": idec_loss, "idec_fit": partial(fit, reconstruction_weight=1.0)}
