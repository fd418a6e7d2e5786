"""CoKe: quantities of the authors' code, computed with the functions that training uses."""

from functools import partial

import torch
from torch import nn

from deepclust.clustering.balanced_assignment import SizeConstraint
from deepclust.methods.coke import CentroidHead, CoKe, PseudoLabelMemory, averaging_weight
from deepclust.nn.lars import Lars
from deepclust.nn.schedules import Constant, DelayedWarmupCosine
from tests.conformance.adapters.secu import make_linear, set_epoch, train, with_prefixes
from tests.conformance.whole_training.coke import train_ours
from tests.conformance.whole_training.given import make_adapter

NEVER = 10**9  # an epoch that no case reaches
INITIAL_LABEL = 1  # of the authors' label memory


def make_method(params, *, num_features, dtype, **settings):
    """Return a CoKe with the heads of the case; a caller that needs networks sets them."""
    backbone = nn.Identity()
    backbone.num_features = num_features
    single = params["kind"] == "single"
    arguments = {"optimizer": partial(torch.optim.SGD, lr=0.0), "schedule": Constant()}
    method = CoKe(
        backbone=backbone,
        num_images=params["N"],
        num_clusters=1,
        head_multiples=params["K"],
        embedding_size=params["D"],
        hidden_size=1,
        projector_layers=2,
        predictor_weight=params["beta"] if single else 0.5,
        small_crops_weight=1 - params["beta"] if params["kind"] == "multi" else 0.0,
        temperature=params["T"],
        label_weight=params.get("alpha", 1.0),
        dual_step=params["dual_lr"],
        min_share=params["ratio"],
        epochs=params.get("stage", NEVER),
        averaging_epochs=0,
        num_slots=params.get("slots", 1),
        label_temperature=params.get("label_temperature", 1.0),
        e_step_every_n_epochs=0,
        **{**arguments, **settings},
    ).to(dtype)
    method.memory.labels.fill_(INITIAL_LABEL)
    return method


BUFFERS = {"pre": "frozen", "cur": "running", "duals": "balance.duals", "counts": "balance.counts"}  # by vector name


def coke_loss(params, inputs):
    method = set_epoch(make_method(params, num_features=1, dtype=inputs["x1"].dtype), params["epoch"])
    for number, head in enumerate(method.heads):
        for name, buffer in BUFFERS.items():
            head.get_buffer(buffer).copy_(inputs[f"{name}{number}"])
    memory = method.memory
    memory.labels.copy_(inputs["labels"].reshape(memory.labels.shape))
    if "slot_weight" in inputs:
        memory.weights.copy_(inputs["slot_weight"])
        memory.following.copy_(inputs["slot_next"])
    views = range(1, sum(name.startswith("x") for name in inputs) + 1)
    leaves = {f"{n}{view}": inputs[f"{n}{view}"].clone().requires_grad_() for n in "xp" for view in views}
    projections, predictions = (torch.stack([leaves[f"{n}{view}"] for view in views]) for n in "xp")
    loss = method.compute_terms_and_update_clusters(projections, predictions, inputs["idx"]).mean()
    loss.backward()
    outputs = {"loss": loss.detach()} | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    for number, head in enumerate(method.heads):
        outputs |= {f"{name}{number}": head.get_buffer(buffer) for name, buffer in BUFFERS.items()}
    outputs["labels"] = memory.labels.reshape(inputs["labels"].shape)
    return outputs | {"slot_weight": memory.weights, "slot_next": memory.following}


def assign(params, inputs):
    balance = SizeConstraint(num_clusters=params["K"], step=0.0, min_share=0.0)
    head = CentroidHead(num_features=params["D"], balance=balance).to(inputs["cur"].dtype)
    balance.duals.copy_(inputs["duals"])
    head.running.copy_(inputs["cur"])
    return {"labels": head.assign(inputs["feats"], averaging=False)}


def cluster_state(params, inputs):
    balance = SizeConstraint(num_clusters=params["K"], step=params["dual_lr"], min_share=params["ratio"])
    head = CentroidHead(num_features=params["D"], balance=balance).to(inputs["c0"].dtype)
    head.frozen.copy_(inputs["c0"])
    head.running.copy_(inputs["c0"])
    stage = params.get("stage", NEVER)
    records = {name: [] for name in ("labels", "cur", "duals", "counts", "epoch_centres")}
    for epoch, batches in enumerate(inputs["feats"]):
        averaging = epoch >= stage
        for step, features in enumerate(batches):
            labels = head.assign(features, averaging=averaging)
            if "labels" in inputs:
                labels = inputs["labels"][epoch, step]
            head.update(features, labels, averaging=averaging)
            records["labels"].append(labels)
            records["cur"].append(head.running.clone())
            records["duals"].append(balance.duals.clone())
            records["counts"].append(balance.counts.clone())
        head.freeze_centroids_and_reset_counts(averaging_weight(epoch, stage), averaging=averaging)
        records["epoch_centres"].append(torch.stack([head.frozen, head.running]))
    return {name: torch.stack(values) for name, values in records.items()}


def label_memory(params, inputs):
    memory = PseudoLabelMemory(
        num_heads=1, num_images=params["N"], num_slots=params["slots"], averaging_epoch=params["stage"]
    )
    memory.labels.fill_(INITIAL_LABEL)
    indices = torch.arange(params["N"])
    records = {name: [] for name in ("target", "slots", "slot_weight", "slot_next")}
    for epoch, labels in enumerate(inputs["labels"]):
        target = memory.read_targets(0, indices, params["K"], epoch=epoch, temperature=params["label_temperature"])
        memory.write(0, indices, labels, epoch=epoch)
        records["target"].append(target)
        records["slots"].append(memory.labels[0].clone())
        records["slot_weight"].append(memory.weights[0].clone())
        records["slot_next"].append(memory.following[0].clone())
    return {name: torch.stack(values) for name, values in records.items()}


def mini_training(params, inputs):
    method = make_method(
        params,
        num_features=params["Din"],
        dtype=inputs["views"].dtype,
        optimizer=partial(
            Lars,
            lr=params["lr"],
            momentum=params["momentum"],
            weight_decay=params["weight_decay"],
            trust=params["trust"],
        ),
        schedule=DelayedWarmupCosine(warmup_epochs=params.get("warmup_epochs", 11), epochs=params["total_epochs"]),
    )
    method.projector = make_linear(inputs["enc_w"], inputs["enc_b"])
    method.predictor = make_linear(inputs["pred_w"], inputs["pred_b"])
    for number, head in enumerate(method.heads):
        head.frozen.copy_(inputs[f"c{number}"])
        head.running.copy_(inputs[f"c{number}"])

    def read_before(method):
        labels = method.memory.labels
        state = {"memory": (labels if "slots" in params else labels[:, :, 0]).clone()}
        for name, layer in (("enc", method.projector), ("pred", method.predictor)):
            state[f"{name}_w"] = layer.weight.detach().clone()
            state[f"{name}_b"] = layer.bias.detach().clone()
        return state

    def read_after(method):
        frozen = {f"pre{n}": head.frozen.clone() for n, head in enumerate(method.heads)}
        return frozen | {f"duals{n}": head.balance.duals.clone() for n, head in enumerate(method.heads)}

    losses, ends = train(method, inputs, params, read_before, read_after)
    return {"loss": losses, **ends}


def lr_schedule(params, inputs):
    schedule = DelayedWarmupCosine(warmup_epochs=params["warmup_epochs"], epochs=params["epochs"])
    per_epoch = params["iters_per_epoch"]
    steps = [epoch * per_epoch + iteration + 1 for epoch, iteration in inputs["probes"].tolist()]
    return {"lr": torch.tensor([params["lr"] * schedule(s, per_epoch) for s in steps], dtype=torch.float64)}


QUANTITIES = {
    "coke_loss": coke_loss,
    "assign": assign,
    "cluster_state": cluster_state,
    "label_memory": label_memory,
    "mini_training": mini_training,
    "lr_schedule": lr_schedule,
    "whole_training": make_adapter(train_ours),
}
ADAPTERS = {quantity: with_prefixes(adapter) for quantity, adapter in QUANTITIES.items()}
