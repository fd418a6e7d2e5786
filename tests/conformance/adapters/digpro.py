"""DigPro: quantities of the authors' code, computed by what training uses."""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from lightning import Trainer
from torch import nn

from deepclust.batch import TrainBatch
from deepclust.losses.prototypes import prototype_scattering_loss
from deepclust.methods.digpro import DigPro, FeatureBank, MomentumGroups, resets_at
from deepclust.nn.ema import decay_at
from deepclust.nn.schedules import WarmupCosine
from tests.conformance.adapters.propos import NETWORKS, GivenBatches, GivenDraws, caught_terms, named
from tests.conformance.test_vectors import check_close

KMEANS = {"num_restarts": 10, "max_iterations": 300, "tolerance": 1e-4}


class LateDigPro(DigPro):
    """A DigPro whose run had made `done` steps when the trainer's began."""

    done = 0

    @property
    def global_step(self):
        return self.done + super().global_step

    @property
    def current_epoch(self):
        return self.global_step // self.steps_per_epoch


def make_method(params, inputs, **settings):
    """A DigPro with the case's little networks; what the case does not say has no effect on it."""
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
    method = LateDigPro(
        backbone=backbone,
        num_clusters=num_clusters,
        embedding_size=embedding,
        hidden_size=hidden,
        temperature=params.get("temperature", 1.0),
        group_weight=params.get("group_weight", 1.0),
        group_temperature=params.get("group_temperature", 1.0),
        group_decay=params.get("beta", 1.0),
        kmeans_restarts=KMEANS["num_restarts"],
        kmeans_max_iterations=KMEANS["max_iterations"],
        kmeans_tolerance=KMEANS["tolerance"],
        e_step_every_n_epochs=0,
        **{**arguments, **settings},
    )
    if "bank" in inputs:  # of any size; a run demands a row for each group
        method.bank = FeatureBank(size=len(inputs["bank"]), num_features=embedding)
    method.to(inputs["online_encoder.0.weight"].dtype)
    given = {f"{NETWORKS[n.split('.')[0]]}.{n.split('.', 1)[1]}": v for n, v in inputs.items() if "." in n}
    for ours, its in (("groups.vectors", "groups"), ("bank.rows", "bank")):
        if its in inputs:
            given[ours] = inputs[its]
    method.load_state_dict({**method.state_dict(), **given})
    return method


def stand_for_trainer(method, global_step):
    """What a method asks of its trainer outside of training."""
    method._trainer = SimpleNamespace(
        datamodule=SimpleNamespace(batches_per_epoch=1),
        accumulate_grad_batches=1,
        current_epoch=0,
        global_step=global_step,
    )


def groups_of(inputs, decay=1.0):
    groups = MomentumGroups(num_groups=len(inputs["groups"]), num_features=inputs["groups"].shape[1], decay=decay)
    groups.to(inputs["groups"].dtype).vectors.copy_(inputs["groups"])
    return groups


def assignment(params, inputs):
    return {"assignment": groups_of(inputs).assign(inputs["z"])}


def update(params, inputs):
    groups, q = groups_of(inputs, params["beta"]), inputs["q"].clone().requires_grad_()
    moved = groups.moved(q)
    (moved * inputs["probe"]).sum().backward()
    return {"groups_new": moved, "assignment": groups.assign(q), "grad_q": q.grad}


def one_direction(params, inputs):
    like = {"online_encoder.0.weight": inputs["W1"], "online_projector.3.weight": inputs["W2"]}
    method = make_method(params, like, num_images=len(inputs["q"]))
    names = {"0.weight": "W1", "0.bias": "b1", "1.weight": "bn_weight", "1.bias": "bn_bias", "3.weight": "W2"}
    predictor = method.predictor
    predictor.load_state_dict(
        {**predictor.state_dict(), **{ours: inputs[its] for ours, its in names.items()}, "3.bias": inputs["b2"]}
    )
    predictor[1].eps, predictor[1].momentum = params["bn_eps"], params["bn_momentum"]
    method.groups.vectors.copy_(inputs["groups"])
    method.pseudo_labels.assignments.copy_(inputs["labels"])
    q = inputs["q"].clone().requires_grad_()
    noise = params["sigma"] * inputs["noise"]
    align, scatter, group = method.direction(q, inputs["k"], noise, torch.arange(len(q)))

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
    groups.to(inputs["bank"].dtype).reset(inputs["bank"], (0,), **KMEANS)
    return {"groups_sorted": groups.vectors}


def check_reset(actual, expected, *, inputs, rtol, atol):
    """Up to the order of the groups."""
    ours, theirs = actual["groups_sorted"], expected["groups_sorted"].to(actual["groups_sorted"])
    order = torch.cdist(theirs, ours).argmin(1)
    assert order.unique().numel() == len(theirs), "two groups in one place"
    check_close({"groups_sorted": ours[order]}, expected, inputs=inputs, rtol=rtol, atol=atol)


def ema_update(params, inputs):
    method = make_method(
        {"first_ema": params["first"], "ema_momentum": params["second"]},
        inputs,
        group_reset_every_n_steps=1 if params["reset_step"] else 10,
    )
    stand_for_trainer(method, global_step=1)
    method.begin_step((0,))
    method.end_step()
    return named(method, "after", ["target_encoder", "target_projector"])


def objective(params, inputs):
    a, b = inputs["view_a"], inputs["view_b"]
    method = make_method(params, inputs, num_images=len(a), bank_size=max(4 * len(a), params["K"]))
    method.pseudo_labels.assignments.copy_(inputs["labels"])
    stand_for_trainer(method, global_step=0)
    noise = inputs["noise"].reshape(2, len(a), -1)
    apart, unweighted = copy.deepcopy(method), caught_terms(method)
    terms = method.losses(TrainBatch((a, b), torch.arange(len(a)), GivenDraws(noise[0], noise[1])))
    sum(terms.values()).backward()
    embeddings = F.normalize(torch.cat([apart.online(a), apart.online(b)]), dim=1)
    assert torch.equal(method.bank.rows[: len(embeddings)], embeddings)
    return {
        **dict(zip(("alignment", "scattering", "group"), unweighted[0], strict=True)),
        "total": sum(terms.values()),
        "groups_new": method.groups.vectors,
        "embeddings": embeddings,
        **named(method, "grad", ["online_encoder", "online_projector", "predictor"], lambda p: p.grad),
        **named(method, "after", ["target_encoder", "target_projector"]),
    }


def train_steps(params, inputs):
    done = params["first_iteration"] - 1
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
        schedule=lambda step, steps_per_epoch: rates(done + step, steps_per_epoch),
    )
    method.done = done
    method.pseudo_labels.assignments.copy_(inputs["pseudo_labels"])
    steps, per_epoch = len(inputs["indices"]), params["iters_per_epoch"]
    seen = {name: [] for name in ("alignment", "scattering", "group", "lr", "momentum")}
    groups_after, inner, total = [], method.objective, params["epochs"] * per_epoch

    def recorded(batch, *, noise_std):
        terms = inner(batch, noise_std=noise_std)
        momentum = decay_at(method.global_step + 1, total, start=method.ema_decay, end=method.ema_decay_end)
        values = (*(float(term.detach()) for term in terms), method.optimizers().param_groups[0]["lr"], momentum)
        for name, value in zip(seen, values, strict=True):
            seen[name].append(value)
        groups_after.append(method.groups.vectors.clone())
        return terms

    method.objective = recorded
    noise = inputs["noise"].reshape(steps, 2, inputs["indices"].shape[1], -1)
    batches = [
        TrainBatch((a, b), indices, GivenDraws(n[0], n[1]))
        for a, b, indices, n in zip(inputs["view_a"], inputs["view_b"], inputs["indices"], noise, strict=True)
    ]
    trainer = Trainer(
        max_epochs=-(-steps // per_epoch),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(method, GivenBatches(batches, per_epoch))
    return {
        **{name: torch.tensor(values, dtype=torch.float64) for name, values in seen.items()},
        "groups_after": torch.stack(groups_after),
        **named(method, "final", list(NETWORKS)),
        "final.bank": method.bank.rows,
        "final.bank_pointer": method.bank.position,
    }


def reset_iterations(params, inputs):
    def first_twelve(every):
        return [step for step in range(1, 13 * every + 2) if resets_at(step, every)][:12]

    return {"iterations": torch.tensor([first_twelve(int(k)) for k in inputs["K"]])}


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
}
CHECKS = {"group_reset": check_reset}
