"""The model behind benchmarks/scaling.py: physical terms, their least-squares fit, and what it says of more GPUs.

Each quantity that is measured is taken to be a sum of terms, each a count of some work times a constant that is not
negative. The constants are those with the least sum of squared relative residuals, so that small cases count as much
as large ones.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from deepclust.clustering.backend import ClusteringSettings
from deepclust.config.composition import read_defaults

Case = Mapping[str, Any]  # the sizes of what is measured, and its figures
IN_TRAINING = ClusteringSettings(**read_defaults("clustering"))


@dataclass(frozen=True)
class Model:
    """A quantity of a case, and its terms: by name, how much of it a case has. The name tells what the constant is."""

    quantity: str
    terms: dict[str, Callable[[Case], float]]

    def predict(self, constants: Mapping[str, float], case: Case) -> float:
        """Return the quantity of a case by the constants of the terms."""
        return sum(constants[name] * count(case) for name, count in self.terms.items())

    def fit(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Return the constants, and the relative residuals of the cases: each of them, the median and the largest."""
        counts = np.array([[count(case) for count in self.terms.values()] for case in cases], dtype=float)
        observed = np.array([case[self.quantity] for case in cases], dtype=float)
        scales = counts.max(0)
        scales[scales == 0] = 1  # of a term that none of the cases has
        scaled, _ = nnls(counts / scales / observed[:, None], np.ones(len(cases)))
        residuals = counts @ (scaled / scales) / observed - 1
        return {
            "quantity": self.quantity,
            "constants": dict(zip(self.terms, (scaled / scales).tolist(), strict=True)),
            "residuals": residuals.tolist(),
            "median_residual": float(np.median(np.abs(residuals))),
            "largest_residual": float(np.abs(residuals).max()),
        }


def one(case: Case) -> float:
    """Return 1, the count of what every case has once."""
    return 1.0


def busy_factor(case: Case) -> float:
    """Return how many times as long work takes because the processes share the cores of one machine."""
    return max(1.0, case["processes"] / case["cores"])


def own_restarts(case: Case) -> int:
    """Return the number of restarts of k-means that one process has to do."""
    return math.ceil(case["restarts"] / case["processes"])


def kmeans_count(per_restart: Callable[[Case], float]) -> Callable[[Case], float]:
    """Return the count of a term of k-means, from that of one restart."""
    return lambda case: busy_factor(case) * own_restarts(case) * per_restart(case)


def seeding_rows(case: Case) -> int:
    """Return among how many rows k-means++ looks for the first centroids."""
    return IN_TRAINING.num_seeding_rows(case["rows"], case["clusters"])


def num_candidates(case: Case) -> int:
    """Return how many rows compete to be the next first centroid."""
    return 2 + int(math.log(case["clusters"]))


def received_bytes(case: Case) -> float:
    """Return the bytes of features that all processes together receive when they are gathered."""
    return (case["processes"] - 1) * 4.0 * case["rows"] * case["features"]


def ring_bytes(case: Case) -> float:
    """Return the bytes of gradients that all processes together send when they are averaged in a ring."""
    return 2 * (case["processes"] - 1) * 4.0 * case["parameters"]


MODELS = {
    "step": Model(
        "seconds",
        {
            "s a step": one,
            "s a floating-point operation": lambda case: case["flops"],
            "s a byte that unfused operations move": lambda case: case["unfused_bytes"],
        },
    ),
    "memory of a step": Model(
        "peak_bytes",
        {
            "bytes": one,
            "bytes a parameter": lambda case: case["parameters"],
            "bytes a byte that the backward pass keeps": lambda case: case["kept_bytes"],
        },
    ),
    "step on several processes": Model(
        "seconds",
        {
            "times the step of one process": lambda case: busy_factor(case) * case["alone_seconds"],
            "s a collective and other process": lambda case: case["collectives"] * (case["processes"] - 1),
            "s a byte of gradients": ring_bytes,
        },
    ),
    "gather": Model(
        "seconds",
        {
            "s a process": lambda case: case["processes"],
            "s a received byte": received_bytes,
        },
    ),
    "E-step": Model(
        "seconds",
        {
            "s": one,
            "s a value read by seeding": kmeans_count(lambda c: seeding_rows(c) * c["clusters"] * c["features"]),
            "s a distance of a candidate": kmeans_count(lambda c: seeding_rows(c) * c["clusters"] * num_candidates(c)),
            "s a multiplication": kmeans_count(
                lambda c: (c["iterations"] + 1) * c["rows"] * c["clusters"] * c["features"]
            ),
            "s a score": kmeans_count(lambda c: (c["iterations"] + 1) * c["rows"] * c["clusters"]),
            "s a value of a row": kmeans_count(lambda c: (c["iterations"] + 1) * c["rows"] * c["features"]),
        },
    ),
    "memory of the E-step": Model(
        "peak_bytes",
        {
            "bytes": one,
            "bytes a byte of features": lambda case: 4.0 * case["rows"] * case["features"],
            "bytes a row and restart": lambda case: case["rows"] * own_restarts(case),
        },
    ),
    "memory of the gather": Model(
        "peak_bytes",
        {"bytes": one, "bytes a byte of features": lambda case: 4.0 * case["rows"] * case["features"]},
    ),
    "size of a checkpoint": Model(
        "bytes",
        {
            "bytes": one,
            "bytes a parameter": lambda case: case["parameters"],
            "bytes an image": lambda case: case["rows"],
        },
    ),
    "time of a checkpoint": Model("seconds", {"s": one, "s a byte": lambda case: case["bytes"]}),
}


@dataclass(frozen=True)
class Assumed:
    """A number that was not measured here, or not on these GPUs, and where it comes from."""

    value: float
    unit: str
    source: str


GUESSES = {
    "latency_in_a_node": Assumed(
        25e-6, "s a small collective", "assumed: NCCL over NVLink, 8 GPUs, called from Python"
    ),
    "latency_over_nodes": Assumed(60e-6, "s a small collective", "assumed: NCCL over InfiniBand, 8 nodes"),
    "bandwidth_in_a_node": Assumed(300e9, "bytes/s a GPU", "assumed: two thirds of NVLink 4's 450 GB/s each way"),
    "bandwidth_over_nodes": Assumed(40e9, "bytes/s a GPU", "assumed: 0.8 of one 400 Gbit/s link for each GPU"),
    "float32": Assumed(40e12, "operations/s", "assumed: 0.6 of the 67 TFLOP/s in its data sheet, without TF32"),
    "float64": Assumed(40e12, "operations/s", "assumed: 0.6 of the 67 TFLOP/s of its tensor cores in its data sheet"),
    "gpu_memory": Assumed(80e9, "bytes", "data sheet of the H100"),
    "iterations": Assumed(100, "iterations of k-means a restart", "assumed: the recipe allows 300"),
}
GPUS_IN_A_NODE = 8


def read_gpu_figures(results: Path, counts: Mapping[str, Any]) -> dict[str, Assumed]:
    """Return what benchmarks on a GPU in the folder `results` say of a step, for a network with the given `counts`.

    `counts` are those of the part "imagenet". If scaling.py has measured this network on a GPU, its images a second
    count. Otherwise they are those of ProPos with ResNet-18 on CIFAR-10, divided by how many times as many bytes an
    image moves: both consist of the same kinds of layers, and memory is what limits them.
    """
    baseline, step = (json.loads((results / f"{name}_gpu.json").read_text()) for name in ("baseline", "step"))
    runs = json.loads((results / "kernels_gpu.json").read_text())["runs"]
    run = next(run for run in runs if run["batch_size"] == 512)
    rate, gpu = baseline["images_per_second"]["framework"], name_machine(baseline["machine"])
    times_bytes, times_flops = (
        counts[f"{count}_per_image"] / counts[f"resnet18_{count}_per_image"] for count in ("unfused_bytes", "flops")
    )
    image_seconds = times_bytes / rate
    source = (
        f"ProPos, ResNet-18, 32 pixels: {rate:,.0f} images/s (baseline_gpu.json, {gpu}), and {times_bytes:.1f} times "
        f"the bytes an image; by its operations it would be {times_flops:.1f} times"
    )
    measured = read_measured_image_seconds(results / "scaling_gpu.json")
    if measured is not None:
        image_seconds, source = measured
    clean_share = counts["clean_unfused_bytes_per_image"] / counts["unfused_bytes_per_image"]
    host_seconds = run["seconds_per_step"]
    return {
        "image_seconds": Assumed(image_seconds, "s an image of training", source),
        "clean_image_seconds": Assumed(
            clean_share * image_seconds,
            "s an image of the E-step's features",
            f"{clean_share:.3f} of the former, as of its bytes",
        ),
        "operation_seconds": Assumed(
            host_seconds / counts["resnet18_operations"],
            "s of the host an operation",
            f"ProPos, ResNet-18, batch 512, without CUDA graphs: {1e3 * host_seconds:.1f} ms a step (kernels_gpu.json, "
            f"{name_machine(run['machine'])}), which has {counts['resnet18_operations']:,} operations; an upper bound, "
            "since the GPU was busy for most of that time",
        ),
        "copy": Assumed(
            step["roof"]["bytes_per_second"],
            "bytes/s",
            f"a large copy on the GPU (step_gpu.json, {name_machine(step['machine'])})",
        ),
    }


def name_machine(machine: Mapping[str, Any]) -> str:
    """Return the GPU or processor, and the commit, of a results file."""
    return f"{machine['gpu'] or machine['processor']}, commit {machine['commit'][:7]}"


def read_measured_image_seconds(file: Path) -> tuple[float, str] | None:
    """Return the seconds an image that scaling.py has measured on a GPU with ResNet-50, and where; or None."""
    if not file.exists():
        return None
    figures = json.loads(file.read_text())
    cases = [case for case in figures.get("step", []) if (case["network"], case["pixels"]) == ("resnet50", 224)]
    if not cases:
        return None
    largest = max(cases, key=lambda case: case["batch"])
    where = f"scaling_gpu.json, {name_machine(figures['machine'])}"
    return largest["seconds"] / largest["batch"], f"measured in batches of {largest['batch']} ({where})"


def read_assumptions(results: Path, counts: Mapping[str, Any]) -> dict[str, Assumed]:
    """Return all that an extrapolation takes for granted, by name."""
    decoding = Assumed(counts["decode_seconds"], "s of a core an image", "measured by the part imagenet, on this CPU")
    return GUESSES | read_gpu_figures(results, counts) | {"decode_seconds": decoding}


def kmeans_seconds_on_gpu(numbers: Mapping[str, float], *, rows: int, features: int, clusters: int) -> float:
    """Return the seconds of one restart of k-means on a GPU, by its arithmetic and its memory traffic.

    An iteration makes scores in float32, passes over them four times, and sums the rows of each cluster by a product in
    float64, for which the memberships are written and read twice. Seeding reads its rows once for each centroid and
    starts some 20 operations.
    """
    multiplications, scores = rows * clusters * features, rows * clusters
    arithmetic = 2 * multiplications / numbers["float32"] + 2 * multiplications / numbers["float64"]
    traffic = scores * (4 * 4 + 3 * 8) / numbers["copy"]
    size = IN_TRAINING.num_seeding_rows(rows, clusters)
    seeding = clusters * (4 * size * features / numbers["copy"] + 20 * numbers["operation_seconds"])
    return seeding + numbers["iterations"] * (arithmetic + traffic)


@dataclass(frozen=True)
class Plan:
    """A run of ProPos on ImageNet-1k: how many GPUs and images, and what `experiment=propos_imagenet` says."""

    gpus: int
    batch_size: int  # images of all GPUs between two synchronisations of batch normalisation
    accumulated: int  # batches for an optimiser step
    synchronises: bool = True  # whether batch statistics are those of all GPUs
    rows: int = 1_281_167
    features: int = 256
    clusters: int = 1000
    restarts: int = 80
    e_step_every: int = 10  # epochs
    decoding_threads: int = 8  # of a process

    @property
    def images_per_gpu(self) -> float:
        return self.batch_size / self.gpus


PLANS = {
    "1 GPU": Plan(1, 256, 16),
    "8 GPUs, as published": Plan(8, 256, 16),
    "8 GPUs, 256, unsynchronised": Plan(8, 256, 16, synchronises=False),
    "8 GPUs, 2048": Plan(8, 2048, 2),
    "64 GPUs, as published": Plan(64, 256, 16),
    "64 GPUs, 2048": Plan(64, 2048, 2),
    "64 GPUs, 4096, unsynchronised": Plan(64, 4096, 1, synchronises=False),
}


def extrapolate(plan: Plan, numbers: Mapping[str, float], counts: Mapping[str, Any]) -> dict[str, float]:
    """Return the seconds of the parts of a batch, of an epoch and of an E-step, and bytes, for a plan.

    `numbers` are the assumptions by name, and `counts` those of the part "imagenet". The host and the GPU work at the
    same time, and decoding beside both. Communication adds to them: batch normalisation waits for it, and that
    gradients are averaged meanwhile is left out.
    """
    is_one_node = plan.gpus <= GPUS_IN_A_NODE
    place = "in_a_node" if is_one_node else "over_nodes"
    latency, bandwidth = numbers[f"latency_{place}"], numbers[f"bandwidth_{place}"]
    is_alone = plan.gpus == 1
    synchronises = plan.synchronises and not is_alone
    others = (plan.gpus - 1) / plan.gpus
    batch = {
        "GPU": plan.images_per_gpu * numbers["image_seconds"],
        "host": numbers["operation_seconds"] * counts["synchronised_operations" if synchronises else "operations"],
        "decoding": plan.images_per_gpu * numbers["decode_seconds"] / plan.decoding_threads,
        "batch normalisation": latency * counts["synchronised_collectives"] if synchronises else 0.0,
        "gradients": others * 2 * 4 * counts["parameters"] / bandwidth / plan.accumulated,
    }
    computing = max(batch["GPU"], batch["host"]) + batch["batch normalisation"] + batch["gradients"]
    batch_seconds = max(computing, batch["decoding"])
    own_rows = plan.rows / plan.gpus
    feature_bytes = 4.0 * plan.rows * plan.features
    e_step = {
        "features": own_rows * max(numbers["clean_image_seconds"], numbers["decode_seconds"] / plan.decoding_threads),
        "gather": others * feature_bytes / bandwidth + 2 * latency * (not is_alone),
        "k-means": math.ceil(plan.restarts / plan.gpus)
        * kmeans_seconds_on_gpu(numbers, rows=plan.rows, features=plan.features, clusters=plan.clusters),
    }
    epoch_seconds = plan.rows / plan.batch_size * batch_seconds + sum(e_step.values()) / plan.e_step_every
    return {
        **{f"batch, {name}": seconds for name, seconds in batch.items()},
        "batch": batch_seconds,
        **{f"E-step, {name}": seconds for name, seconds in e_step.items()},
        "epoch": epoch_seconds,
        "epoch_images_per_second": plan.rows / epoch_seconds,
        "e_step_share": sum(e_step.values()) / plan.e_step_every / epoch_seconds,
        "kept_bytes": plan.images_per_gpu * counts["kept_bytes_per_image"],
        "gathered_bytes": (2 if is_alone else 2 + 3 / plan.gpus) * feature_bytes,
        "kept_share": plan.images_per_gpu * counts["kept_bytes_per_image"] / numbers["gpu_memory"],
    }
