"""SeCu: quantities of the authors' code, computed with the functions that training uses."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from lightning import Callback, Trainer
from torch import nn

from deepclust.backbones.resnet import ResNet
from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.balanced_assignment import EntropyConstraint, SizeConstraint
from deepclust.engine import distributed
from deepclust.methods.secu import SeCu
from deepclust.nn.heads import three_layer_mlp, two_layer_mlp
from deepclust.nn.lars import Lars
from deepclust.nn.schedules import Constant, DelayedWarmupCosine, RisingCosine
from deepclust.views.photometry import PillowBlur, Solarize
from tests.conformance.adapters.propos import GivenBatches
from tests.conformance.whole_training.given import make_adapter, make_hashed_values
from tests.conformance.whole_training.secu import train_ours

INITIAL_LABEL = 1  # of the authors' label memory


def make_method(params, *, num_features, num_images, dtype, **settings):
    """Return a SeCu with the heads of the case; a caller that needs networks sets them."""
    backbone = nn.Identity()
    backbone.num_features = num_features
    arguments = {
        "prototype_lr": 0.0,
        "prototype_schedule": Constant(),
        "optimizer": partial(torch.optim.SGD, lr=0.0),
        "schedule": Constant(),
    }
    method = SeCu(
        backbone=backbone,
        num_images=num_images,
        num_clusters=1,
        head_multiples=params["K"],
        embedding_size=params["D"],
        hidden_size=1,
        projector_layers=2,
        predictor=params.get("predictor", False),
        temperature=params.get("tx", params.get("t", 1.0)),
        prototype_temperature=params.get("tw", params.get("t", 1.0)),
        label_weight=params.get("tau", 0.0),
        balance=params["constraint"],
        dual_step=params.get("dual_lr", 0.0),
        min_share=params.get("lratio", 0.0),
        entropy_weight=params.get("alpha", 0.0) / num_images,
        e_step_every_n_epochs=0,
        **{**arguments, **settings},
    ).to(dtype)
    method.pseudo_labels.fill_(INITIAL_LABEL)
    return method


def set_epoch(method, epoch):
    method._trainer = SimpleNamespace(current_epoch=epoch)
    return method


def load_state(method, inputs):
    """Copy the state of the case into the method and return it."""
    for number, head in enumerate(method.heads):
        for name, buffer in (
            ("w", head.prototypes.data),
            ("prev", head.frozen),
            ("labels", method.pseudo_labels[number]),
            ("counts", head.balance.counts),
            ("duals", getattr(head.balance, "duals", None)),
        ):
            if f"{name}{number}" in inputs:
                buffer.copy_(inputs[f"{name}{number}"])
    return method


def read_state(method):
    """Return the state of the method by its names in the vectors."""
    state = {}
    for number, head in enumerate(method.heads):
        state[f"labels{number}"] = method.pseudo_labels[number].clone()
        state[f"counts{number}"] = head.balance.counts.clone()
        if isinstance(head.balance, SizeConstraint):
            state[f"duals{number}"] = head.balance.duals.clone()
    return state


def compute_one_step(params, inputs):
    """Return both losses of a step, their gradients and the state after it."""
    names = [name for name in ("x1", "x2", "p1", "p2") if name in inputs]
    leaves = {name: inputs[name].clone().requires_grad_() for name in names}
    method = make_method(params, num_features=1, num_images=params["N"], dtype=inputs["x1"].dtype)
    set_epoch(load_state(method, inputs), params["epoch"])
    losses = method.compute_terms_and_update_pseudo_labels(torch.stack(list(leaves.values())), inputs["idx"])
    representation, prototypes = (values.mean() for values in losses)
    (representation + prototypes).backward()
    outputs = {"loss_x": representation.detach(), "loss_c": prototypes.detach(), **read_state(method)}
    outputs |= {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    for number, head in enumerate(method.heads):
        outputs[f"grad_w{number}"] = head.prototypes.grad
        outputs[f"assigned{number}"] = method.pseudo_labels[number][inputs["idx"]]
    return outputs


def run_on_ranks(function, world_size):
    """Return the results of `function(rank)` on several ranks that gather from each other; threads play processes."""
    barrier, local, rows_by_rank = threading.Barrier(world_size), threading.local(), [None] * world_size

    def all_gather(rows):
        rows_by_rank[local.rank] = rows.detach()
        barrier.wait()
        joined = torch.cat(rows_by_rank)
        barrier.wait()
        return joined

    def run(rank):
        local.rank = rank
        return function(rank)

    patch = mock.patch.multiple(distributed, all_gather=all_gather, world_size=lambda: world_size)
    with patch, ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def secu_loss(params, inputs):
    if "world" not in params:
        return compute_one_step(params, inputs)
    rank_inputs = {name for name in inputs if name in ("x1", "x2", "p1", "p2", "idx")}

    def compute_step_of_rank(rank):
        return compute_one_step(params, {n: v[rank] if n in rank_inputs else v for n, v in inputs.items()})

    ranks = run_on_ranks(compute_step_of_rank, params["world"])
    dtype = inputs["x1"].dtype
    shared = set(read_state(make_method(params, num_features=1, num_images=params["N"], dtype=dtype)))
    for name in shared:
        assert all(torch.equal(outputs[name], ranks[0][name]) for outputs in ranks), f"{name} differs by rank"
    return {
        name: ranks[0][name] if name in shared else torch.stack([outputs[name] for outputs in ranks])
        for name in ranks[0]
    }


def assign_size(params, inputs):
    balance = SizeConstraint(num_clusters=params["K"], step=0.0, min_share=0.0).to(inputs["cost"].dtype)
    balance.duals.copy_(inputs["duals"])
    return {"labels": balance.assign(-inputs["cost"], None)}


def assign_entropy(params, inputs):
    balance = EntropyConstraint(num_clusters=params["K"], weight=params["alpha"]).to(inputs["cost"].dtype)
    balance.counts.copy_(inputs["counts"])
    return {"labels": balance.assign(-inputs["cost"], inputs["last"] if params["epoch"] else None)}


def dual_update(params, inputs):
    balance = SizeConstraint(num_clusters=params["K"], step=params["dual_lr"], min_share=params["lratio"])
    balance.to(inputs["duals0"].dtype)
    balance.duals.copy_(inputs["duals0"])
    duals, counts = [], []
    for labels in inputs["labels"]:
        balance.update(labels, None)
        duals.append(balance.duals.clone())
        counts.append(balance.counts.clone())
    return {"duals": torch.stack(duals), "counts": torch.stack(counts)}


def count_update(params, inputs):
    params = {**params, "D": 1, "constraint": "entropy", "K": [params["K"]]}
    method = make_method(params, num_features=1, num_images=params["N"], dtype=torch.float32)
    counts, memory = [], []
    for epoch, (orders, labels) in enumerate(zip(inputs["order"], inputs["labels"], strict=True)):
        set_epoch(method, epoch)
        for order, given in zip(orders, labels, strict=True):
            method.store_pseudo_labels_and_update_balance(order, given.unsqueeze(0))
            counts.append(method.heads[0].balance.counts.clone())
        memory.append(method.pseudo_labels[0].clone())
        method.heads[0].balance.end_epoch()
    return {"counts": torch.stack(counts), "memory": torch.stack(memory)}


def make_optimizer(params, groups, lr):
    if params.get("optimiser", "SGD") == "LARS":
        return Lars(
            groups,
            lr=lr,
            momentum=params["momentum"],
            weight_decay=params["weight_decay"],
            trust=params.get("trust", 0.001),
        )
    return torch.optim.SGD(groups, lr=lr, momentum=params["momentum"], weight_decay=params["weight_decay"])


def centre_update(params, inputs):
    method = make_method(
        params,
        num_features=1,
        num_images=len(inputs["labels0"]),
        dtype=inputs["x1"].dtype,
        prototype_lr=params["clr"],
    )
    set_epoch(load_state(method, inputs), params["epoch"])
    group = method.parameter_groups()[1]
    optimizer = make_optimizer(params, [{"params": group["params"], "lr": group["lr"]}], lr=0.0)
    records = {"loss_c": []} | {f"{n}{h}": [] for n in ("w", "assigned") for h in range(len(params["K"]))}
    network_outputs = torch.stack([inputs[name] for name in ("x1", "x2", "p1", "p2") if name in inputs], 1)
    for rows, indices in zip(network_outputs, inputs["idx"], strict=True):
        loss = method.compute_terms_and_update_pseudo_labels(rows, indices)[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        records["loss_c"].append(loss.detach())
        for number, head in enumerate(method.heads):
            records[f"w{number}"].append(head.prototypes.detach().clone())
            records[f"assigned{number}"].append(method.pseudo_labels[number][indices])
    return {**read_state(method), **{name: torch.stack(values) for name, values in records.items()}}


class TrainingRecorder(Callback):
    """Records the loss of each step, and the state of the method at the end of each epoch.

    `read_before(method)` and `read_after(method)` return the state before and after the method's own hook.
    """

    def __init__(self, read_before, read_after):
        self.read_before, self.read_after = read_before, read_after
        self.losses, self.epoch_ends = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach().clone())

    def on_train_epoch_end(self, trainer, pl_module):
        self.epoch_ends.append(self.read_before(pl_module))

    def on_train_epoch_start(self, trainer, pl_module):
        if self.epoch_ends:
            self.epoch_ends[-1] |= self.read_after(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.epoch_ends[-1] |= self.read_after(pl_module)


def train(method, inputs, params, read_before, read_after):
    """Train for the epochs of the case; return the losses by step and the state at the end of each epoch by name."""
    perm, size = inputs["perm"], params["B"]
    batches = [
        TrainBatch(tuple(views[:, at]), at, Draws(key=(epoch, number), first_row=0, global_batch_size=len(at)))
        for epoch, (order, views) in enumerate(zip(perm, inputs["views"], strict=True))
        for number, at in enumerate(order.split(size))
    ]
    recorder = TrainingRecorder(read_before, read_after)
    trainer = Trainer(
        max_epochs=params["epochs_run"],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[recorder],
    )
    trainer.fit(method, GivenBatches(batches, len(batches) // params["epochs_run"]))
    ends = {name: torch.stack([end[name] for end in recorder.epoch_ends]) for name in recorder.epoch_ends[0]}
    return torch.stack(recorder.losses), ends


def make_linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    return layer


def mini_training(params, inputs):
    method = make_method(
        params,
        num_features=params["Din"],
        num_images=params["N"],
        dtype=inputs["views"].dtype,
        prototype_lr=params["clr"],
        optimizer=lambda groups: make_optimizer(params, groups, params["lr"]),
        schedule=DelayedWarmupCosine(warmup_epochs=params.get("warmup_epochs", 11), epochs=params["total_epochs"]),
    )
    load_state(method, inputs).projector = make_linear(inputs["enc_w"], inputs["enc_b"])

    def read_before(method):
        return {name.replace("labels", "memory"): values for name, values in read_state(method).items()}

    def read_after(method):
        prototypes = {f"w{n}": head.prototypes.detach().clone() for n, head in enumerate(method.heads)}
        layer = method.projector
        return prototypes | {"enc_w": layer.weight.detach().clone(), "enc_b": layer.bias.detach().clone()}

    losses, ends = train(method, inputs, params, read_before, read_after)
    return {"loss": losses, **ends}


def lr_schedule(params, inputs):
    network = DelayedWarmupCosine(warmup_epochs=params["warmup_epochs"], epochs=params["epochs"])
    rising = params["recipe"] == "imagenet" and params["constraint"] == "entropy"
    prototypes = RisingCosine(epochs=params["epochs"]) if rising else Constant()
    per_epoch = params["iters_per_epoch"]
    steps = [epoch * per_epoch + iteration + 1 for epoch, iteration in inputs["probes"].tolist()]
    rates = [(params["lr"] * network(s, per_epoch), params["clr"] * prototypes(s, per_epoch)) for s in steps]
    return {"lr": torch.tensor(rates, dtype=torch.float64)}


def lars(params, inputs):
    values = {n[1:]: nn.Parameter(v.clone()) for n, v in inputs.items() if n.startswith("p")}
    optimizer = Lars(
        list(values.values()),
        lr=0.0,
        momentum=params["momentum"],
        weight_decay=params["weight_decay"],
        trust=params["trust"],
    )
    steps = {number: [] for number in values}
    for step, lr in enumerate(inputs["lrs"].tolist()):
        optimizer.param_groups[0]["lr"] = lr
        for number, value in values.items():
            value.grad = inputs[f"g{number}"][step]
        optimizer.step()
        for number, value in values.items():
            steps[number].append(value.detach().clone())
    return {f"p{number}": torch.stack(values) for number, values in steps.items()}


@torch.no_grad()
def network_forward(params, inputs):
    stem = {"cifar": "cifar", "stl": "cifar_pool"}[params["variant"]]
    backbone = ResNet(depth=18, stem=stem, in_channels=3)
    network = nn.Sequential(backbone, two_layer_mlp(backbone.num_features, 512, 128)).train(params["train_mode"])
    first_salt = params.get("first_salt", 1)
    for number, parameter in enumerate(network.parameters()):
        if "shapes" in inputs:
            shape = [n for n in inputs["shapes"][number].tolist() if n]
            assert list(parameter.shape) == shape, f"parameter {number}"
        u = make_hashed_values(parameter.numel(), first_salt + number).reshape(parameter.shape)
        if parameter.dim() > 1:
            parameter.copy_(u * (24 / parameter[0].numel()) ** 0.5)
        else:
            parameter.copy_(1 + 0.2 * u if is_norm_weight(network, parameter) else 0.2 * u)
    assert sum(p.numel() for p in network.parameters()) == params["n_parameters"]
    shape = (params["B"], 3, params["size"], params["size"])
    images = 4 * make_hashed_values(int(np.prod(shape)), 9999).reshape(shape).float()
    embedding = network(images)
    norm = backbone.network.bn1
    return {
        "embedding": embedding,
        "stem_running_mean": norm.running_mean,
        "stem_running_var": norm.running_var,
    }


def is_norm_weight(network, parameter):
    """Whether `parameter` is the weight of a batch normalisation."""
    norms = (m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return any(norm.weight is parameter for norm in norms)


@torch.no_grad()
def imagenet_heads(params, inputs):
    projector = three_layer_mlp(params["M"], params["M"], params["D"]).to(inputs["x"].dtype)
    predictor = two_layer_mlp(params["D"], params["M"], params["D"]).to(inputs["x"].dtype)
    for network, name in ((projector, "proj"), (predictor, "pred")):
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(inputs[f"{name}{number}"])
    projection = projector(inputs["x"])
    return {"projection": projection, "prediction": predictor(projection)}


def augment_ops(params, inputs):
    image = inputs["image"].permute(2, 0, 1).unsqueeze(0) / 255
    chosen = torch.ones(1, dtype=torch.bool)
    outputs = {}
    for number, sigma in enumerate(params["sigmas"]):
        blur = PillowBlur(p=1.0, sigma=(sigma, sigma))
        outputs[f"blur{number}"] = blur.apply(image, {"chosen": chosen, "sigma": torch.tensor([sigma])})
    outputs["solarize"] = Solarize(p=1.0, threshold=0.50196).apply(image, {"chosen": chosen})
    return {name: (value[0].permute(1, 2, 0) * 255).round() for name, value in outputs.items()}


def check_grey_levels(actual, expected, *, inputs, rtol, atol):
    """Check grey levels. They are integers in the vectors, which the usual check compares without a tolerance."""
    assert set(expected) <= set(actual)
    for name, values in expected.items():
        difference = (actual[name].double() - values.double()).abs().max()
        assert difference <= atol + rtol * 255, f"{name}: {difference} levels apart"


def with_prefixes(adapter):
    """Return the adapter for arrays that are named in_... and out_..."""

    def compute(params, inputs):
        outputs = adapter(params, {name.removeprefix("in_"): values for name, values in inputs.items()})
        return {f"out_{name}": values for name, values in outputs.items()}

    return compute


QUANTITIES = {
    "secu_loss": secu_loss,
    "assign_size": assign_size,
    "assign_entropy": assign_entropy,
    "dual_update": dual_update,
    "count_update": count_update,
    "centre_update": centre_update,
    "mini_training": mini_training,
    "lr_schedule": lr_schedule,
    "lars": lars,
    "network_forward": network_forward,
    "imagenet_heads": imagenet_heads,
    "augment_ops": augment_ops,
    "whole_training": make_adapter(train_ours),
}
ADAPTERS = {quantity: with_prefixes(adapter) for quantity, adapter in QUANTITIES.items()}
CHECKS = {"augment_ops": check_grey_levels}
