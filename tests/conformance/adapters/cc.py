"""CC: the quantities of the authors' code, computed with the functions that training uses."""

import torch
import torch.nn.functional as F
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.losses.balance import cluster_size_entropy_deficit
from deepclust.losses.contrastive import nt_xent
from deepclust.methods.cc import CC, cluster_contrast, cluster_losses, instance_loss
from tests.conformance.whole_training.cc import train_ours
from tests.conformance.whole_training.given import make_adapter


def copy_with_gradients(inputs, *names):
    """Return copies of the named inputs that require gradients."""
    return [inputs[name].clone().requires_grad_() for name in names]


def instance(params, inputs):
    """Return the loss and its gradients from unit rows (z), from rows of any length (u), or from both."""
    temperature = params["instance_temperature"]
    outputs = {}
    for names, loss_function in ((("z_i", "z_j"), nt_xent), (("u_i", "u_j"), instance_loss)):
        if names[0] in inputs:
            leaves = copy_with_gradients(inputs, *names)
            outputs["loss"] = loss_function(*leaves, temperature=temperature)
            outputs["loss"].backward()
            outputs |= {f"grad_{name}": leaf.grad for name, leaf in zip(names, leaves, strict=True)}
    return outputs


def cluster_losses_of_probabilities(c_i, c_j, *, temperature):
    """Return the contrast of clusters and their imbalance, as `cluster_losses` does from logits."""
    imbalance = cluster_size_entropy_deficit(c_i) + cluster_size_entropy_deficit(c_j)
    return cluster_contrast(c_i, c_j, temperature=temperature), imbalance


def cluster(params, inputs):
    """Return the losses and their gradients from probabilities (c), from logits, or from both."""
    outputs = {}
    for names, loss_function in (
        (("c_i", "c_j"), cluster_losses_of_probabilities),
        (("logits_i", "logits_j"), cluster_losses),
    ):
        if names[0] in inputs:
            leaves = copy_with_gradients(inputs, *names)
            contrast, balance = loss_function(*leaves, temperature=params["cluster_temperature"])
            (contrast + balance).backward()
            outputs |= {"loss": contrast + balance, "contrast_part": contrast, "entropy_part": balance}
            outputs |= {f"grad_{name}": leaf.grad for name, leaf in zip(names, leaves, strict=True)}
    return outputs


def total(params, inputs):
    backbone = nn.Identity()
    backbone.num_features = inputs["inst_w1"].shape[1]
    method = CC(
        backbone=backbone,
        num_clusters=len(inputs["clus_w2"]),
        embedding_size=len(inputs["inst_w2"]),
        instance_temperature=params["instance_temperature"],
        cluster_temperature=params["cluster_temperature"],
        optimizer=torch.optim.Adam,
        schedule=lambda step, steps_per_epoch: 1.0,
    ).to(inputs["h_i"].dtype)
    for prefix, head in (("inst", method.instance_head), ("clus", method.cluster_head)):
        names = {"0.weight": "w1", "0.bias": "b1", "2.weight": "w2", "2.bias": "b2"}
        head.load_state_dict({parameter: inputs[f"{prefix}_{name}"] for parameter, name in names.items()})
    h_i, h_j = copy_with_gradients(inputs, "h_i", "h_j")
    batch = TrainBatch((h_i, h_j), torch.arange(len(h_i)), Draws(key=(0,), first_row=0, global_batch_size=len(h_i)))
    terms = method.losses(batch)
    loss = sum(terms.values())
    loss.backward()
    return {
        "z_i": F.normalize(method.instance_head(h_i), dim=1),
        "z_j": F.normalize(method.instance_head(h_j), dim=1),
        "c_i": method.cluster_logits(h_i).softmax(1),
        "c_j": method.cluster_logits(h_j).softmax(1),
        "loss_instance": terms["instance"],
        "loss_cluster": terms["cluster"] + terms["balance"],
        "loss": loss,
        "pred_i": method.cluster_logits(h_i).argmax(1),
        "grad_h_i": h_i.grad,
        "grad_h_j": h_j.grad,
        "grad_inst_w2": method.instance_head[2].weight.grad,
        "grad_clus_w2": method.cluster_head[2].weight.grad,
    }


ADAPTERS = {
    "instance_loss": instance,
    "cluster_loss": cluster,
    "total_loss": total,
    "whole_training": make_adapter(train_ours),
}
