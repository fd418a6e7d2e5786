"""DigPro: the quantities of the authors' code, computed with the functions that training uses."""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import nn

from deepclust.batch import TrainBatch
from deepclust.losses.prototypes import prototype_scattering_loss
from deepclust.methods.digpro import DigPro, FeatureBank, MomentumGroups, is_reset_step
from deepclust.nn.ema import compute_ema_decay
from deepclust.nn.schedules import WarmupCosine
from tests.conformance.adapters.propos import (
    NETWORKS,
    GivenBatches,
    GivenNoise,
    name_as_in_vectors,
    record_calls,
)
from tests.conformance.test_vectors import check_close
from tests.conformance.whole_training.digpro import train_ours
from tests.conformance.whole_training.given import make_adapter

KMEANS_OPTIONS = {"num_restarts": 10, "max_iterations": 300, "tolerance": 1e-4}


class ResumedDigPro(DigPro):
    """A DigPro of a run that had made `num_earlier_steps` steps before the trainer started."""

    num_earlier_steps = 0

    @property
    def global_step(self):
        return self.num_earlier_steps + super().global_step

    @property
    def current_epoch(self):
        return self.global_step // self.steps_per_epoch


def make_method(params, inputs, **settings):
    """Return a DigPro with the small networks of the case; settings that the case leaves out have no effect on it."""
    mid, size = inputs["online_encoder.0.weight"].shape
    embedding, hidden = inputs["online_projector.3.weight"].shape
    backbone = nn.Sequential(nn.Linear(size, mid), nn.BatchNorm1d(mid), nn.ReLU())
    backbone.num_features = mid
    num_clusters = params.get("K", 1)
    arguments = {
        "num_images": 1,
        "bank_size": num_clusters,
        "noise_std": params.get("sigma", 0.0),
        "scattering_weight": params.get("lam", 0.0),
        "warmup_epochs": 0,
        "epochs": 1,
        "first_ema_decay": params.get("first_ema"),
        "ema_decay": params.get("ema_momentum"),
        "ema_decay_end": params.get("ema_momentum"),
        "predictor_lr_factor": 1.0,
        "group_reset_every_n_steps": num_clusters,
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0),
        "schedule": lambda step, steps_per_epoch: 1.0,
    }
    method = ResumedDigPro(
        backbone=backbone,
        num_clusters=num_clusters,
        embedding_size=embedding,
        hidden_size=hidden,
        temperature=params.get("temperature", 1.0),
        group_weight=params.get("group_weight", 1.0),
        group_temperature=params.get("group_temperature", 1.0),
        group_decay=params.get("beta", 1.0),
        kmeans_restarts=KMEANS_OPTIONS["num_restarts"],
        kmeans_max_iterations=KMEANS_OPTIONS["max_iterations"],
        kmeans_tolerance=KMEANS_OPTIONS["tolerance"],
        e_step_every_n_epochs=0,
        **{**arguments, **settings},
    )
    if "bank" in inputs:  # the constructor accepts only banks with a row for each group
        method.bank = FeatureBank(size=len(inputs["bank"]), num_features=embedding)
    method.to(inputs["online_encoder.0.weight"].dtype)
    given_state = {f"{NETWORKS[n.split('.')[0]]}.{n.split('.', 1)[1]}": v for n, v in inputs.items() if "." in n}
    for buffer, name in (("groups.vectors", "groups"), ("bank.rows", "bank")):
        if name in inputs:
            given_state[buffer] = inputs[name]
    method.load_state_dict({**method.state_dict(), **given_state})
    return method


def attach_trainer_stub(method, global_step):
    """Give the method a stand-in for the trainer with all that a step outside of training reads from it."""
    method._trainer = SimpleNamespace(
        datamodule=SimpleNamespace(batches_per_epoch=1),
        accumulate_grad_batches=1,
        current_epoch=0,
        global_step=global_step,
    )


def make_groups(inputs, decay=1.0):
    groups = MomentumGroups(num_groups=len(inputs["groups"]), num_features=inputs["groups"].shape[1], decay=decay)
    groups.to(inputs["groups"].dtype).vectors.copy_(inputs["groups"])
    return groups


def assignment(params, inputs):
    return {"assignment": make_groups(inputs).assign(inputs["z"])}


def update(params, inputs):
    groups, q = make_groups(inputs, params["beta"]), inputs["q"].clone().requires_grad_()
    updated_groups = groups.compute_update(q)
    (updated_groups * inputs["probe"]).sum().backward()
    return {"groups_new": updated_groups, "assignment": groups.assign(q), "grad_q": q.grad}


def one_direction(params, inputs):
    networks_of_same_size = {"online_encoder.0.weight": inputs["W1"], "online_projector.3.weight": inputs["W2"]}
    method = make_method(params, networks_of_same_size, num_images=len(inputs["q"]))
    names = {"0.weight": "W1", "0.bias": "b1", "1.weight": "bn_weight", "1.bias": "bn_bias", "3.weight": "W2"}
    predictor = method.predictor
    predictor.load_state_dict(
        {
            **predictor.state_dict(),
            **{parameter: inputs[name] for parameter, name in names.items()},
            "3.bias": inputs["b2"],
        }
    )
    predictor[1].eps, predictor[1].momentum = params["bn_eps"], params["bn_momentum"]
    method.groups.vectors.copy_(inputs["groups"])
    method.pseudo_labels.assignments.copy_(inputs["labels"])
    q = inputs["q"].clone().requires_grad_()
    noise = params["sigma"] * inputs["noise"]
    align, scatter, group = method.compute_terms_and_update_groups(q, inputs["k"], noise, torch.arange(len(q)))

    def gradient(term, variable):
        return torch.autograd.grad(term, variable, retain_graph=True)[0]

    return {
        "group": group,
        "grad_q_group": gradient(group, q),
        "grad_W2_group": gradient(group, predictor[3].weight),
        "alignment": align,
        "grad_q_alignment": gradient(align, q),
        "scattering": scatter,
        "grad_q_scattering": gradient(scatter, q),
        "groups_new": method.groups.vectors,
        "bn_running_mean": predictor[1].running_mean,
        "bn_running_var": predictor[1].running_var,
    }


def aggregation(params, inputs):
    q = inputs["q"].clone().requires_grad_()
    loss = prototype_scattering_loss(q, inputs["k"], inputs["labels"], params["K"], temperature=params["temperature"])
    loss.backward()
    return {"loss": loss, "grad_q": q.grad}


def memory_bank(params, inputs):
    bank = FeatureBank(size=params["size"], num_features=inputs["bank_init"].shape[1]).to(inputs["bank_init"].dtype)
    bank.rows.copy_(inputs["bank_init"])
    after, positions = [], []
    for rows in inputs["batch_rows"].split(params["batches"]):
        bank.push(rows)
        after.append(bank.rows.clone())
        positions.append(bank.position.clone())
    return {"bank_after": torch.stack(after), "pointer_after": torch.stack(positions)}


def reset(params, inputs):
    groups = MomentumGroups(num_groups=params["K"], num_features=inputs["bank"].shape[1], decay=1.0)
    groups.to(inputs["bank"].dtype).reset_to_centroids(inputs["bank"], (0,), **KMEANS_OPTIONS)
    return {"groups_sorted": groups.vectors}


def check_reset(actual, expected, *, inputs, rtol, atol):
    """Compare the groups in any order."""
    actual_groups, expected_groups = actual["groups_sorted"], expected["groups_sorted"].to(actual["groups_sorted"])
    order = torch.cdist(expected_groups, actual_groups).argmin(1)
    assert order.unique().numel() == len(expected_groups), "two expected groups are matched with the same group"
    check_close({"groups_sorted": actual_groups[order]}, expected, inputs=inputs, rtol=rtol, atol=atol)


def ema_update(params, inputs):
    method = make_method(
        {"first_ema": params["first"], "ema_momentum": params["second"]},
        inputs,
        group_reset_every_n_steps=1 if params["reset_step"] else 10,
    )
    attach_trainer_stub(method, global_step=1)
    method.reset_groups_or_update_target((0,))
    method.update_target()
    return name_as_in_vectors(method, "after", ["target_encoder", "target_projector"])


def objective(params, inputs):
    a, b = inputs["view_a"], inputs["view_b"]
    method = make_method(params, inputs, num_images=len(a), bank_size=max(4 * len(a), params["K"]))
    method.pseudo_labels.assignments.copy_(inputs["labels"])
    attach_trainer_stub(method, global_step=0)
    noise = inputs["noise"].reshape(2, len(a), -1)
    method_before = copy.deepcopy(method)
    terms_by_direction = record_calls(method, "compute_terms_and_update_groups")
    terms = method.losses(TrainBatch((a, b), torch.arange(len(a)), GivenNoise(noise[0], noise[1])))
    sum(terms.values()).backward()
    embeddings = F.normalize(torch.cat([method_before.online(a), method_before.online(b)]), dim=1)
    assert torch.equal(method.bank.rows[: len(embeddings)], embeddings)
    return {
        **dict(zip(("alignment", "scattering", "group"), mean_over_directions(terms_by_direction), strict=True)),
        "total": sum(terms.values()),
        "groups_new": method.groups.vectors,
        "embeddings": embeddings,
        **name_as_in_vectors(method, "grad", ["online_encoder", "online_projector", "predictor"], lambda p: p.grad),
        **name_as_in_vectors(method, "after", ["target_encoder", "target_projector"]),
    }


def mean_over_directions(terms_by_direction):
    """Return the means of the terms over the two directions of one step."""
    terms_ab, terms_ba = terms_by_direction
    return [(ab + ba) / 2 for ab, ba in zip(terms_ab, terms_ba, strict=True)]


def train_steps(params, inputs):
    num_earlier_steps = params["first_iteration"] - 1
    rates = WarmupCosine(warmup_epochs=params["warmup_epochs"], epochs=params["epochs"], variant="fractional")
    method = make_method(
        params,
        inputs,
        num_images=len(inputs["pseudo_labels"]),
        warmup_epochs=params["warmup_epochs"],
        epochs=params["epochs"],
        predictor_lr_factor=params["predictor_lr_factor"],
        ema_decay=params["momentum_base"],
        ema_decay_end=params.get("momentum_max", 1.0) if params["momentum_increase"] else params["momentum_base"],
        optimizer=lambda groups: torch.optim.SGD(
            groups, lr=params["base_lr"], momentum=params["sgd_momentum"], weight_decay=params["weight_decay"]
        ),
        schedule=lambda step, steps_per_epoch: rates(num_earlier_steps + step, steps_per_epoch),
    )
    method.num_earlier_steps = num_earlier_steps
    method.pseudo_labels.assignments.copy_(inputs["pseudo_labels"])
    num_steps, batches_per_epoch = len(inputs["indices"]), params["iters_per_epoch"]
    recorded = {name: [] for name in ("alignment", "scattering", "group", "lr", "momentum")}
    groups_after, steps_of_run = [], params["epochs"] * batches_per_epoch
    losses, terms_by_direction = method.losses, record_calls(method, "compute_terms_and_update_groups")

    def losses_and_record(batch):
        terms_by_direction.clear()
        weighted_terms = losses(batch)
        momentum = compute_ema_decay(
            method.global_step + 1, steps_of_run, start=method.ema_decay, end=method.ema_decay_end
        )
        terms = [float(term.detach()) for term in mean_over_directions(terms_by_direction)]
        values = (*terms, method.optimizers().param_groups[0]["lr"], momentum)
        for name, value in zip(recorded, values, strict=True):
            recorded[name].append(value)
        groups_after.append(method.groups.vectors.clone())
        return weighted_terms

    method.losses = losses_and_record
    noise = inputs["noise"].reshape(num_steps, 2, inputs["indices"].shape[1], -1)
    batches = [
        TrainBatch((a, b), indices, GivenNoise(n[0], n[1]))
        for a, b, indices, n in zip(inputs["view_a"], inputs["view_b"], inputs["indices"], noise, strict=True)
    ]
    trainer = Trainer(
        max_epochs=-(-num_steps // batches_per_epoch),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, GivenBatches(batches, batches_per_epoch))
    return {
        **{name: torch.tensor(values, dtype=torch.float64) for name, values in recorded.items()},
        "groups_after": torch.stack(groups_after),
        **name_as_in_vectors(method, "final", list(NETWORKS)),
        "final.bank": method.bank.rows,
        "final.bank_pointer": method.bank.position,
    }


def reset_iterations(params, inputs):
    def first_twelve_resets(every_n_steps):
        return [step for step in range(1, 13 * every_n_steps + 2) if is_reset_step(step, every_n_steps)][:12]

    return {"iterations": torch.tensor([first_twelve_resets(int(k)) for k in inputs["K"]])}


ADAPTERS = {
    "group_assignment": assignment,
    "group_update": update,
    "one_direction_losses": one_direction,
    "prototype_aggregation_loss": aggregation,
    "memory_bank": memory_bank,
    "group_reset": reset,
    "ema_update": ema_update,
    "objective": objective,
    "train_steps": train_steps,
    "reset_iterations": reset_iterations,
    "whole_training": make_adapter(train_ours),
}
CHECKS = {"group_reset": check_reset}
