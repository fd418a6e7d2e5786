"""k-means and nearest neighbours on the CPU, ours against faiss.

    python benchmarks/estep.py [--threads 1] [--rounds 5] [--out estep.json]

Both in turns on the same rows in one process; medians over the rounds of the wall clock and of the processor time of
all threads. k-means does the same number of iterations on both sides, on clusters so close that no restart is done
before, with restarts and with all rows (faiss takes 256 a cluster unless told otherwise). Ours seeds by greedy
k-means++, which its time includes and the column "seeding" shows; faiss starts from random rows.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import torch
from torch import Tensor
from torch.nn.functional import normalize

import deepclust
from deepclust.clustering.kmeans import kmeans, seed_kmeans_plus_plus
from deepclust.clustering.neighbors import nearest_neighbors

ITERATIONS = 20
CASES = [  # rows, features, clusters, restarts
    (1_797, 256, 10, 10),
    (60_000, 256, 10, 10),
    (60_000, 256, 200, 1),
]
Work = Callable[[], object]


def close_clusters(size: int, features: int, clusters: int) -> Tensor:
    """Unit rows (size, features) about centres that are hardly further apart than the rows of one cluster."""
    draws = torch.Generator().manual_seed(0)
    centres = 0.1 * torch.randn(clusters, features, generator=draws)
    noise = torch.randn(size, features, generator=draws)
    return normalize(noise + centres[torch.randint(clusters, (size,), generator=draws)], dim=1)


def cluster(rows: Tensor, clusters: int, restarts: int, metric: str) -> dict[str, Work]:
    def ours() -> object:
        return kmeans(
            rows,
            num_clusters=clusters,
            metric=metric,  # type: ignore[arg-type]
            restarts=range(restarts),
            max_iterations=ITERATIONS,
            tolerance=0.0,
            key=("benchmark",),
        )

    def seeding() -> object:
        candidates = 2 + int(torch.tensor(clusters).log())
        draws = torch.Generator().manual_seed(0)
        first = torch.randint(len(rows), (restarts,), generator=draws)
        uniforms = torch.rand(restarts, clusters - 1, candidates, generator=draws)
        return seed_kmeans_plus_plus(rows, first, uniforms, metric=metric)  # type: ignore[arg-type]

    def theirs() -> object:
        return faiss.Kmeans(
            rows.shape[1],
            clusters,
            niter=ITERATIONS,
            nredo=restarts,
            spherical=metric == "cosine",
            max_points_per_centroid=10**9,
            early_stop_threshold=-1.0,
        ).train(rows.numpy())

    return {"ours": ours, "seeding": seeding, "faiss": theirs}


def search(rows: Tensor, neighbours: int) -> dict[str, Work]:
    def theirs() -> object:
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(rows.numpy())
        return index.search(rows.numpy(), neighbours)

    return {
        "ours": lambda: nearest_neighbors(rows, rows, neighbours, metric="inner_product", exclude=None),
        "faiss": theirs,
    }


def measure(works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of each work, by the wall clock and (ending in `_cpu`) of the processor."""
    taken: dict[str, list[float]] = {name + kind: [] for name in works for kind in ("", "_cpu")}
    for work in works.values():
        work()  # the first call sets up buffers
    for _ in range(rounds):
        for name, work in works.items():
            wall, processor = time.perf_counter(), time.process_time()
            work()
            taken[name].append(time.perf_counter() - wall)
            taken[name + "_cpu"].append(time.process_time() - processor)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)

    cases: list[tuple[str, dict[str, Work]]] = []
    for size, features, clusters, restarts in CASES:
        rows = close_clusters(size, features, clusters)
        for metric in ("cosine", "euclidean"):
            name = f"k-means, {metric}, {size:,} x {features}, K = {clusters}, {restarts} restart(s)"
            cases.append((name, cluster(rows, clusters, restarts, metric)))
    cases.append(("20 nearest of 20,000 x 128", search(close_clusters(20_000, 128, 10), 20)))

    result: dict[str, Any] = {
        "threads": options.threads,
        "rounds": options.rounds,
        "iterations": ITERATIONS,
        "processor": platform.processor() or platform.machine(),
        "versions": {"deepclust": deepclust.__version__, "torch": torch.__version__, "faiss": faiss.__version__},
        "cases": {},
    }
    print(f"{options.threads} thread(s), {result['versions']}, medians of {options.rounds}; seconds, in brackets CPU")
    print(f"{'':<66}{'ours':>16}{'seeding':>9}{'faiss':>16}{'ours / faiss':>14}")
    for name, works in cases:
        seconds = measure(works, options.rounds)
        result["cases"][name] = seconds
        ours, theirs = (f"{seconds[who]:.3f} ({seconds[who + '_cpu']:.3f})" for who in ("ours", "faiss"))
        seeding = f"{seconds['seeding']:.3f}" if "seeding" in seconds else ""
        print(f"{name:<66}{ours:>16}{seeding:>9}{theirs:>16}{seconds['ours'] / seconds['faiss']:>14.2f}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
