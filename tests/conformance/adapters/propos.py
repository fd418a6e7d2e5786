"""ProPos: the quantities of the authors' code, computed with the functions that training uses."""

import copy
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from lightning import LightningDataModule, Trainer
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from deepclust.clustering.kmeans import kmeans_from_centroids
from deepclust.clustering.kmeans_seeding import seed_kmeans_plus_plus
from deepclust.datasets.named_datasets import cifar100_superclass
from deepclust.losses.alignment import alignment_loss
from deepclust.losses.prototypes import batch_prototypes, prototype_scattering_loss
from deepclust.methods.propos import ProPos, balanced_sampling_weights
from deepclust.metrics import ClusteringScores
from deepclust.nn.ema import compute_ema_decay, update_target
from deepclust.nn.heads import two_layer_mlp
from deepclust.nn.schedules import WarmupCosine
from tests.conformance.whole_training.given import make_adapter
from tests.conformance.whole_training.propos import train_ours

NETWORKS = {  # names of the networks in the vectors -> names of the method's submodules
    "online_encoder": "backbone",
    "online_projector": "projector",
    "target_encoder": "target.backbone",
    "target_projector": "target.projector",
    "predictor": "predictor",
}


class GivenNoise(Draws):
    """Draws that return the noise given by the case for the two directions of a step."""

    def __init__(self, noise_a, noise_b):
        super().__init__(key=(0,), first_row=0, global_batch_size=len(noise_a))
        self.noise = {"noise of a": noise_a, "noise of b": noise_b}

    def normal_like(self, values, purpose):
        return self.noise[purpose]


def prototypes(params, inputs):
    return {"centers": batch_prototypes(inputs["z"], inputs["labels"], params["K"])}


def scattering(params, inputs):
    q = inputs["q"].clone().requires_grad_()
    loss = prototype_scattering_loss(q, inputs["k"], inputs["labels"], params["K"], temperature=params["temperature"])
    loss.backward()
    return {
        "loss": loss,
        "grad_q": q.grad,
        "q_centers": batch_prototypes(inputs["q"], inputs["labels"], params["K"]),
        "k_centers": batch_prototypes(inputs["k"], inputs["labels"], params["K"]),
    }


def positive_sampling(params, inputs):
    hidden, embedding = inputs["W1"].shape
    predictor = two_layer_mlp(embedding, hidden, embedding).to(inputs["q"].dtype)
    names = {"0.weight": "W1", "0.bias": "b1", "1.weight": "bn_weight", "1.bias": "bn_bias", "3.weight": "W2"}
    predictor.load_state_dict(
        {
            **predictor.state_dict(),
            **{parameter: inputs[name] for parameter, name in names.items()},
            "3.bias": inputs["b2"],
        }
    )
    predictor[1].eps, predictor[1].momentum = params["bn_eps"], params["bn_momentum"]
    q = inputs["q"].clone().requires_grad_()
    loss = alignment_loss(predictor(q + params["sigma"] * inputs["noise"]), F.normalize(inputs["k"], dim=1))
    loss.backward()
    return {
        "loss": loss,
        "grad_q": q.grad,
        "grad_W1": predictor[0].weight.grad,
        "grad_W2": predictor[3].weight.grad,
        "bn_running_mean": predictor[1].running_mean,
        "bn_running_var": predictor[1].running_var,
    }


def make_method(params, inputs, *, step_order, num_images, **settings):
    """Return a ProPos with the small networks of the case."""
    mid, size = inputs["online_encoder.0.weight"].shape
    hidden, embedding = inputs["predictor.0.weight"].shape
    backbone = nn.Sequential(nn.Linear(size, mid), nn.BatchNorm1d(mid), nn.ReLU())
    backbone.num_features = mid
    arguments = {
        "warmup_epochs": 0,
        "epochs": 1,
        "predictor_lr_factor": 1.0,
        "ema_decay": params.get("ema_momentum"),
        "ema_decay_end": params.get("ema_momentum"),
        "optimizer": lambda groups: torch.optim.SGD(groups, lr=0.0),
        "schedule": lambda step, steps_per_epoch: 1.0,
    }
    method = ProPos(
        backbone=backbone,
        num_images=num_images,
        num_clusters=params["K"],
        embedding_size=embedding,
        hidden_size=hidden,
        step_order=step_order,
        temperature=params["temperature"],
        noise_std=params["sigma"],
        scattering_weight=params["lam"],
        shuffle_target=False,
        queue_size=0,
        balanced_sampling=False,
        decay_biases_and_norms=True,
        kmeans_restarts=1,
        kmeans_max_iterations=1,
        kmeans_tolerance=0.0,
        e_step_every_n_epochs=0,
        **{**arguments, **settings},
    ).to(inputs["online_encoder.0.weight"].dtype)
    given_state = {f"{NETWORKS[n.split('.')[0]]}.{n.split('.', 1)[1]}": v for n, v in inputs.items() if "." in n}
    method.load_state_dict({**method.state_dict(), **given_state})
    return method


def name_as_in_vectors(method, prefix, networks, of=lambda tensor: tensor):
    """Return `of` of each parameter and buffer of these networks, under the names of the vectors."""
    tensors = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    return {
        f"{prefix}.{network}{name.removeprefix(submodule)}": of(tensor)
        for network, submodule in NETWORKS.items()
        for name, tensor in tensors.items()
        if name.startswith(f"{submodule}.") and network in networks
    }


def objective(step_order):
    def compute(params, inputs):
        a, b, labels = inputs["view_a"], inputs["view_b"], inputs["labels"]
        method = make_method(params, inputs, step_order=step_order, num_images=len(a))
        method.pseudo_labels.assignments.copy_(labels)
        method._trainer = SimpleNamespace(
            datamodule=SimpleNamespace(batches_per_epoch=1),
            accumulate_grad_batches=1,
            current_epoch=0,
            global_step=0,
        )
        noise = inputs["noise"].reshape(2, len(a), -1)
        batch = TrainBatch((a, b), torch.arange(len(a)), GivenNoise(noise[0], noise[1]))
        method_before = copy.deepcopy(method)
        unweighted_terms = record_calls(method, "compute_terms")
        terms = method.losses(batch)
        sum(terms.values()).backward()
        if step_order == "joint":
            embeddings = method_before.online(torch.cat([a, b]))
        else:
            embeddings = torch.cat([method_before.online(a), method_before.online(b)])
        constant = alignment_constant(step_order)
        return {
            "alignment": terms["alignment"] + constant,
            "scattering": unweighted_terms[0][1],
            "total": sum(terms.values()) + constant,
            "embeddings": F.normalize(embeddings, dim=1),
            **name_as_in_vectors(method, "grad", ["online_encoder", "online_projector", "predictor"], lambda p: p.grad),
            **name_as_in_vectors(method, "after", ["target_encoder", "target_projector"]),
        }

    return compute


def record_calls(method, function_name):
    """Return a list to which every later call of this function of the method appends its result."""
    function, results = getattr(method, function_name), []

    def recorded(*tensors):
        results.append(function(*tensors))
        return results[-1]

    setattr(method, function_name, recorded)
    return results


def alignment_constant(step_order):
    """Return the constant that the authors' code adds to the alignment when it prints it."""
    return 2.0 if step_order == "joint" else 0.0


def train_steps(step_order):
    def compute(params, inputs):
        rates = WarmupCosine(
            warmup_epochs=params["warmup_epochs"], epochs=params["epochs"], variant=params["lr_variant"]
        )
        method = make_method(
            params,
            inputs,
            step_order=step_order,
            num_images=len(inputs["pseudo_labels"]),
            warmup_epochs=params["warmup_epochs"],
            epochs=params["epochs"],
            predictor_lr_factor=params["predictor_lr_factor"],
            ema_decay=params["momentum_base"],
            ema_decay_end=params["momentum_max"] if params["momentum_increase"] else params["momentum_base"],
            optimizer=lambda groups: torch.optim.SGD(
                groups,
                lr=params["base_lr"],
                momentum=params["sgd_momentum"],
                weight_decay=params["weight_decay"],
            ),
            schedule=rates,
        )
        method.pseudo_labels.assignments.copy_(inputs["pseudo_labels"])
        num_steps, batches_per_epoch = len(inputs["indices"]), params["iters_per_epoch"]
        recorded = {"alignment": [], "scattering": [], "lr": [], "predictor_lr": [], "momentum": []}
        compute_terms, steps_of_run = method.compute_terms, params["epochs"] * batches_per_epoch

        def compute_terms_and_record(*tensors):
            align, scatter = compute_terms(*tensors)
            groups = method.optimizers().param_groups
            decay_end = method.ema_decay_end
            for name, value in {
                "alignment": float(align) + alignment_constant(step_order),
                "scattering": float(scatter),
                "lr": groups[0]["lr"],
                "predictor_lr": groups[-1]["lr"],
                "momentum": compute_ema_decay(
                    method.global_step + 1, steps_of_run, start=method.ema_decay, end=decay_end
                ),
            }.items():
                recorded[name].append(value)
            return align, scatter

        method.compute_terms = compute_terms_and_record
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
            **name_as_in_vectors(method, "final", list(NETWORKS)),
        }

    return compute


class GivenBatches(LightningDataModule):
    """The batches of the case, `batches_per_epoch` of them in each epoch."""

    def __init__(self, batches, batches_per_epoch):
        super().__init__()
        self.batches = batches
        self.batches_per_epoch = batches_per_epoch

    def train_dataloader(self):
        datamodule = self

        class BatchesOfCurrentEpoch:
            def __len__(self):
                return datamodule.batches_per_epoch

            def __iter__(self):
                start = datamodule.trainer.current_epoch * datamodule.batches_per_epoch
                yield from datamodule.batches[start : start + datamodule.batches_per_epoch]

        return BatchesOfCurrentEpoch()


def lr_schedule(params, inputs):
    rates = WarmupCosine(warmup_epochs=params["warmup_epochs"], epochs=params["epochs"], variant=params["variant"])
    lr = [params["base_lr_after_scaling"] * rates(int(t), params["iters_per_epoch"]) for t in inputs["step"]]
    lr = torch.tensor(lr, dtype=torch.float64)
    return {"lr": lr, "predictor_lr": lr * params["predictor_factor"]}


def ema_momentum(params, inputs):
    steps = params["epochs"] * params["iters_per_epoch"]
    end = params["max"] if params["increase"] else params["base"]
    return {
        "momentum": torch.tensor(
            [compute_ema_decay(int(t), steps, start=params["base"], end=end) for t in inputs["step"]],
            dtype=torch.float64,
        )
    }


def ema_update(params, inputs):
    after = {}
    for online_net, target_net in (
        ("online_encoder", "target_encoder"),
        ("online_projector", "target_projector"),
    ):
        online = nn.ParameterList([v for n, v in inputs.items() if n.startswith(online_net)])
        names = [n.replace(online_net, target_net, 1) for n in inputs if n.startswith(online_net)]
        target = nn.ParameterList([inputs[n].clone() for n in names])
        update_target(target, online, params["momentum"])
        after.update({f"after.{name}": value for name, value in zip(names, target, strict=True)})
    return after


def kmeans_from_centres(params, inputs):
    result = kmeans_from_centroids(
        inputs["X"],
        inputs["init_centers"],
        metric=params["metric"],
        max_iterations=params["max_iter"],
        tolerance=params["tol"],
    )
    return {
        "labels": result.assignments,
        "centers": result.centroids,
        "inertia": torch.tensor(result.inertia),
        "counts": torch.bincount(result.assignments, minlength=params["K"]),
    }


def kmeans_best(params, inputs):
    result = kmeans_on_all_ranks(
        inputs["X"],
        num_clusters=params["K"],
        metric="cosine",
        num_restarts=params["n_init"],
        max_iterations=params["max_iter"],
        tolerance=params["tol"],
        key=(params["seed"],),
    )
    return {"labels": result.assignments, "inertia": torch.tensor(result.inertia)}


def check_kmeans_best(actual, expected, *, inputs, rtol, atol):
    from sklearn.metrics import adjusted_rand_score

    assert float(actual["inertia"]) <= float(expected["inertia"]) * (1 + rtol) + atol
    if float(actual["inertia"]) >= float(expected["inertia"]) * (1 - rtol) - atol:  # a better result may differ
        assert adjusted_rand_score(expected["labels"], actual["labels"]) >= 0.99


def greedy_seeding(params, inputs):
    first, uniforms = inputs["first"].reshape(1), inputs["uniforms"].unsqueeze(0)
    return {"indices": seed_kmeans_plus_plus(inputs["X"], first, uniforms, metric="cosine")[0]}


def clustering_metrics(params, inputs):
    classes = int(inputs["y"].max()) + 1 if len(inputs["y"]) else 1
    metric = ClusteringScores(num_clusters=int(inputs["pred"].max()) + 1, num_classes=max(classes, 1))
    metric.update(inputs["pred"], inputs["y"])
    scores = metric.compute()
    return {name: scores[name] for name in ("nmi", "acc", "ari")}


def sampling_weights(params, inputs):
    return {"weights": balanced_sampling_weights(inputs["labels"], params["K"])}


def superclasses(params, inputs):
    return {"coarse": torch.as_tensor(cifar100_superclass(inputs["fine"].numpy()))}


ADAPTERS = {
    "prototypes": prototypes,
    "prototype_scattering_loss": scattering,
    "positive_sampling_alignment": positive_sampling,
    "objective_two_pass": objective("two_pass"),
    "objective_joint": objective("joint"),
    "train_steps_two_pass": train_steps("two_pass"),
    "train_steps_joint": train_steps("joint"),
    "lr_schedule": lr_schedule,
    "ema_momentum_schedule": ema_momentum,
    "ema_update": ema_update,
    "kmeans_from_centers": kmeans_from_centres,
    "kmeans_best_of_restarts": kmeans_best,
    "kmeanspp_greedy": greedy_seeding,
    "clustering_metrics": clustering_metrics,
    "balanced_sampling_weights": sampling_weights,
    "cifar20_superclasses": superclasses,
    "whole_training": make_adapter(train_ours),
}
CHECKS = {"kmeans_best_of_restarts": check_kmeans_best}
