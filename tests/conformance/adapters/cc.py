"""CC: the quantities of the authors' code, computed with the functions that training uses."""

import torch
import torch.nn.functional as F
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.losses.balance import cluster_size_entropy_deficit
from deepclust.losses.contrastive import nt_xent
from deepclust.methods.cc import CC, cluster_contrast, cluster_losses, instance_loss


def copy_with_gradients(inputs, *names):
    """Return copies of the named inputs that require gradients."""
    return [inputs[name].clone().requires_grad_() for name in names]


def instance(params, inputs):
    temperature = params["instance_temperature"]
    z_i, z_j, u_i, u_j = copy_with_gradients(inputs, "z_i", "z_j", "u_i", "u_j")
    nt_xent(z_i, z_j, temperature=temperature).backward()
    loss = instance_loss(u_i, u_j, temperature=temperature)
    loss.backward()
    grads = {"grad_z_i": z_i, "grad_z_j": z_j, "grad_u_i": u_i, "grad_u_j": u_j}
    return {"loss": loss, **{name: variable.grad for name, variable in grads.items()}}


def cluster(params, inputs):
    temperature = params["cluster_temperature"]
    c_i, c_j, logits_i, logits_j = copy_with_gradients(inputs, "c_i", "c_j", "logits_i", "logits_j")
    contrast = cluster_contrast(c_i, c_j, temperature=temperature)
    (contrast + cluster_size_entropy_deficit(c_i) + cluster_size_entropy_deficit(c_j)).backward()
    contrast, balance = cluster_losses(logits_i, logits_j, temperature=temperature)
    (contrast + balance).backward()
    grads = {"grad_c_i": c_i, "grad_c_j": c_j, "grad_logits_i": logits_i, "grad_logits_j": logits_j}
    return {
        "loss": contrast + balance,
        "contrast_part": contrast,
        "entropy_part": balance,
        **{name: variable.grad for name, variable in grads.items()},
    }


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


ADAPTERS = {"instance_loss": instance, "cluster_loss": cluster, "total_loss": total}
