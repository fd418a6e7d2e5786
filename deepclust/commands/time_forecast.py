"""How long `deepclust cluster` will take, foretold from a first measured block of features and of each later step."""

import time
from collections.abc import Callable, Sequence

import torch
from hydra import compose
from omegaconf import DictConfig
from torch import Tensor

from deepclust.backbones.mlp import Mlp
from deepclust.clustering.neighbors import nearest_neighbors
from deepclust.commands.cluster_numbers import list_numbers
from deepclust.engine.durations import format_duration

NUM_MEASURED = 4096  # rows among which neighbours are looked for
NUM_QUERIES = 128
NUM_REPETITIONS = 5  # of which the fastest counts: the first is slower, and other work comes in between
SECONDS_FOR_MAP_POINT = 0.006  # t-SNE of 2,000 points takes about 12 s in one thread of a CPU
OUTLIER_PRODUCTS = 1000  # for an image: with 10,000 rows of 128 numbers, as if these were 1,280


def foretell_time(cfg: DictConfig, features: Tensor, *, seconds_per_image: float, num_images: int) -> str:
    """Return how long features, clusters and report of `num_images` will take, for the log.

    `features` (N, D) are those of a first block, of which an image took `seconds_per_image`. The clusters are those of
    LNSCC, whose embedding serves all numbers of clusters that are asked for; clusters and report are made for each. Of
    `auto` nobody knows as yet how many numbers it will name, so that the text says what each after the first one takes.
    """
    numbers = list_numbers(cfg.num_clusters)
    lnscc = compose("train", overrides=["method=lnscc"])
    num_fitted = min(num_images, cfg.max_fitted)
    batch_size = min(lnscc.batch_size, num_fitted)
    usual_steps = lnscc.trainer.max_epochs * (num_fitted // batch_size)
    num_steps = min(max(usual_steps, cfg.min_steps), cfg.max_steps)
    with torch.random.fork_rng(devices=[]):  # the steps that follow draw what they would have drawn
        rows = torch.randn(NUM_MEASURED, features.shape[1])
        training = num_steps * measure_step(rows[: 2 * batch_size], lnscc.method.backbone.hidden_sizes)
    product = measure_seconds_per_product(rows)
    graph = num_fitted**2 * product
    embedding_share = lnscc.method.centres_after_epochs / lnscc.trainer.max_epochs
    clusters_of_number = cfg.num_seeds * (graph + (1 - embedding_share) * training)
    report_of_number = num_images * OUTLIER_PRODUCTS * product + cfg.report.map_points * SECONDS_FOR_MAP_POINT
    parts = {
        "features": num_images * seconds_per_image,
        "clusters": cfg.num_seeds * (graph + embedding_share * training) + len(numbers) * clusters_of_number,
        "report": len(numbers) * report_of_number,
    }
    texts = [f"{name} {format_duration(seconds)}" for name, seconds in parts.items()]
    text = f"this will take about {format_duration(sum(parts.values()))}: {', '.join(texts)}"
    if numbers != ["auto"]:
        return text
    return (
        f"{text}; {format_duration(clusters_of_number + report_of_number)} more for each further number that auto names"
    )


def measure_seconds_per_product(rows: Tensor) -> float:
    """Return the seconds that one product of two of these rows (N, D) takes in a search for neighbours."""
    own = torch.arange(NUM_QUERIES)
    seconds = measure(lambda: nearest_neighbors(rows[own], rows, 10, metric="inner_product", exclude=own))
    return seconds / (NUM_QUERIES * len(rows))


def measure_step(rows: Tensor, hidden_sizes: Sequence[int]) -> float:
    """Return the seconds of a training step of LNSCC's network on rows (N, D)."""
    network = Mlp(channels=rows.shape[1], image_size=1, hidden_sizes=hidden_sizes, num_features=32)
    optimizer = torch.optim.Adam(network.parameters())

    def step() -> None:
        optimizer.zero_grad()
        network(rows).square().mean().backward()
        optimizer.step()

    return measure(step)


def measure(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several calls."""
    seconds = []
    for _ in range(NUM_REPETITIONS):
        started_at = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started_at)
    return min(seconds)
