"""Self-EvoC: quantities of its formulas, which are this project's own, with the functions that training uses."""

from functools import partial

import torch
from torch import nn

from deepclust.clustering.reliable_images import fuzzy_memberships, measure_certainty, select_reliable
from deepclust.methods.self_evoc import SelfEvoC, classifier_targets
from deepclust.nn.schedules import Constant
from tests.conformance.adapters.dec import make_leaves


def make_method(params, *, num_images, num_features, num_clusters):
    """Return Self-EvoC with the numbers of the case; what the loss does not depend on is arbitrary."""
    backbone = nn.Identity()
    backbone.num_features = num_features
    return SelfEvoC(
        backbone=backbone,
        decoder=nn.Identity(),
        classifier=backbone,
        num_images=num_images,
        num_clusters=num_clusters,
        fuzzifier=2.0,
        certainty="entropy",
        first_share=0.2,
        share_growth=0.03,
        largest_share=0.5,
        least_reliable=20,
        label_smoothing=0.1,
        target_temperature=1.0,
        even=True,
        min_confidence=0.6,
        alpha=params["alpha"],
        reconstruction_weight=params["reconstruction_weight"],
        classifier_epochs=1,
        clustering_epochs=1,
        stop_below=0.0,
        stop_after_rounds=1,
        kmeans_restarts=1,
        kmeans_max_iterations=1,
        kmeans_tolerance=0.0,
        optimizer=partial(torch.optim.SGD, lr=0.0),
        classifier_optimizer=partial(torch.optim.SGD, lr=0.0),
        schedule=Constant(),
    )


def memberships(params, inputs):
    u = fuzzy_memberships(inputs["z"], inputs["centres"], fuzzifier=params["fuzzifier"])
    return {
        "u": u,
        "certainty": measure_certainty(u, by="entropy"),
        "margin": measure_certainty(u, by="margin"),
        "labels": u.argmax(1),
    }


def reliable_set(params, inputs):
    reliable = select_reliable(
        inputs["labels"],
        inputs["certainty"],
        share=params["share"],
        least=params["least"],
        num_clusters=params["num_clusters"],
    )
    return {"reliable": reliable}


def target(params, inputs):
    return {"p": classifier_targets(inputs["logits"], temperature=params["temperature"], even=params["even"])}


def clustering_loss(params, inputs):
    z, centres, reconstruction = make_leaves(inputs, "z", "centres", "reconstruction")
    method = make_method(params, num_images=len(z), num_features=z.shape[1], num_clusters=len(centres)).to(z.dtype)
    del method.centres  # a parameter; the centres of the case collect its gradients
    method.centres = centres
    loss = sum(method.compute_terms(z, inputs["p"], inputs["x"], reconstruction).values())
    loss.backward()
    return {
        "loss": loss,
        "grad_z": z.grad,
        "grad_centres": centres.grad,
        "grad_reconstruction": reconstruction.grad,
    }


ADAPTERS = {
    "fuzzy_membership": memberships,
    "reliable_set": reliable_set,
    "classifier_target": target,
    "clustering_loss": clustering_loss,
}
