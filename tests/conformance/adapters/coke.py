"""CoKe: quantities of the authors' code, computed by what training uses."""

from functools import partial

import torch
from torch import nn

from deepclust.clustering.balanced_assignment import SizeBalance
from deepclust.methods.coke import CentroidHead, CoKe, LabelMemory, epoch_share
from deepclust.nn.optimizers import Lars
from deepclust.nn.schedules import Constant, DeadEpochCosine
from tests.conformance.adapters.secu import at_epoch, linear, train, with_prefixes

NEVER = 10**9  # an epoch that no case reaches
EMPTY = 1  # what the authors' label memory holds at first


def make_method(params, *, num_features, dtype, **settings):
    """A CoKe with the case's heads; its networks are put in by who needs them."""
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
    method.memory.labels.fill_(EMPTY)
    return method


PLACES = (("pre", "frozen"), ("cur", "running"), ("duals", "balance.duals"), ("counts", "balance.counts"))


def coke_loss(params, inputs):
    method = at_epoch(make_method(params, num_features=1, dtype=inputs["x1"].dtype), params["epoch"])
    for number, head in enumerate(method.each_head()):
        for its, ours in PLACES:
            head.get_buffer(ours).copy_(inputs[f"{its}{number}"])
    memory = method.memory
    memory.labels.copy_(inputs["labels"].reshape(memory.labels.shape))
    if "slot_weight" in inputs:
        memory.weights.copy_(inputs["slot_weight"])
        memory.following.copy_(inputs["slot_next"])
    views = range(1, sum(name.startswith("x") for name in inputs) + 1)
    leaves = {f"{n}{view}": inputs[f"{n}{view}"].clone().requires_grad_() for n in "xp" for view in views}
    projections, predictions = (torch.stack([leaves[f"{n}{view}"] for view in views]) for n in "xp")
    loss = method.objective(projections, predictions, inputs["idx"]).mean()
    loss.backward()
    found = {"loss": loss.detach()} | {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    for number, head in enumerate(method.each_head()):
        found |= {f"{its}{number}": head.get_buffer(ours) for its, ours in PLACES}
    found["labels"] = memory.labels.reshape(inputs["labels"].shape)
    return found | {"slot_weight": memory.weights, "slot_next": memory.following}


def assign(params, inputs):
    balance = SizeBalance(num_clusters=params["K"], step=0.0, min_share=0.0)
    head = CentroidHead(num_features=params["D"], balance=balance).to(inputs["cur"].dtype)
    balance.duals.copy_(inputs["duals"])
    head.running.copy_(inputs["cur"])
    return {"labels": head.assign(inputs["feats"], averaging=False)}


def cluster_state(params, inputs):
    balance = SizeBalance(num_clusters=params["K"], step=params["dual_lr"], min_share=params["ratio"])
    head = CentroidHead(num_features=params["D"], balance=balance).to(inputs["c0"].dtype)
    head.frozen.copy_(inputs["c0"])
    head.running.copy_(inputs["c0"])
    stage = params.get("stage", NEVER)
    found = {name: [] for name in ("labels", "cur", "duals", "counts", "epoch_centres")}
    for epoch, batches in enumerate(inputs["feats"]):
        averaging = epoch >= stage
        for step, features in enumerate(batches):
            labels = head.assign(features, averaging=averaging)
            if "labels" in inputs:
                labels = inputs["labels"][epoch, step]
            head.update(features, labels, averaging=averaging)
            found["labels"].append(labels)
            found["cur"].append(head.running.clone())
            found["duals"].append(balance.duals.clone())
            found["counts"].append(balance.counts.clone())
        head.end_epoch(epoch_share(epoch, stage), averaging=averaging)
        found["epoch_centres"].append(torch.stack([head.frozen, head.running]))
    return {name: torch.stack(values) for name, values in found.items()}


def label_memory(params, inputs):
    memory = LabelMemory(
        num_heads=1, num_images=params["N"], num_slots=params["slots"], averaging_epoch=params["stage"]
    )
    memory.labels.fill_(EMPTY)
    everything = torch.arange(params["N"])
    found = {name: [] for name in ("target", "slots", "slot_weight", "slot_next")}
    for epoch, labels in enumerate(inputs["labels"]):
        target = memory.read(0, everything, params["K"], epoch=epoch, temperature=params["label_temperature"])
        memory.write(0, everything, labels, epoch=epoch)
        found["target"].append(target)
        found["slots"].append(memory.labels[0].clone())
        found["slot_weight"].append(memory.weights[0].clone())
        found["slot_next"].append(memory.following[0].clone())
    return {name: torch.stack(values) for name, values in found.items()}


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
        schedule=DeadEpochCosine(warmup_epochs=11, epochs=params["total_epochs"]),
    )
    method.projector = linear(inputs["enc_w"], inputs["enc_b"])
    method.predictor = linear(inputs["pred_w"], inputs["pred_b"])
    for number, head in enumerate(method.each_head()):
        head.frozen.copy_(inputs[f"c{number}"])
        head.running.copy_(inputs[f"c{number}"])

    def before(method):
        labels = method.memory.labels
        found = {"memory": (labels if "slots" in params else labels[:, :, 0]).clone()}
        for name, layer in (("enc", method.projector), ("pred", method.predictor)):
            found[f"{name}_w"] = layer.weight.detach().clone()
            found[f"{name}_b"] = layer.bias.detach().clone()
        return found

    def after(method):
        frozen = {f"pre{n}": head.frozen.clone() for n, head in enumerate(method.each_head())}
        return frozen | {f"duals{n}": head.balance.duals.clone() for n, head in enumerate(method.each_head())}

    losses, ends = train(method, inputs, params, before, after)
    return {"loss": losses, **ends}


def lr_schedule(params, inputs):
    schedule = DeadEpochCosine(warmup_epochs=params["warmup_epochs"], epochs=params["epochs"])
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
}
ADAPTERS = {quantity: with_prefixes(adapter) for quantity, adapter in QUANTITIES.items()}
