"""k-means and nearest neighbours, ours against scikit-learn, faiss and the code of ProPos's authors.

    python benchmarks/estep.py [--threads 1] [--rounds 5] [--large] [--code DIR]

All in turns on the same rows in one process; medians over the rounds. k-means does the same number of iterations on
all sides, on clusters so close that no restart is done before, with restarts and with all rows (faiss takes 256 a
cluster unless told otherwise). Ours, scikit-learn and the authors seed by greedy k-means++, which their time includes
(ours also in the column "seeding"); faiss starts from random rows. On a GPU ours and the authors' run there, the others
on the CPU. DIR is a copy of github.com/Hzzone/torch_clustering, which the authors' E-step calls.
"""

import importlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import torch
from measure import bare_packages, in_turns, options, ratio, save, table
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

from deepclust.clustering.kmeans import kmeans, seed_kmeans_plus_plus
from deepclust.clustering.neighbors import nearest_neighbors

ITERATIONS = 20
CASES = [  # rows, features, clusters, restarts
    (1_797, 256, 10, 10),
    (60_000, 256, 10, 10),
    (60_000, 256, 200, 1),
]
LARGE = [(1_281_167, 256, 1000, 1)]  # ImageNet
OTHERS = "faiss", "scikit-learn", "authors' code"
Work = Callable[[], object]


def close_clusters(size: int, features: int, clusters: int) -> Tensor:
    """Unit rows (size, features) about centres that are hardly further apart than the rows of one cluster."""
    draws = torch.Generator().manual_seed(0)
    centres = 0.1 * torch.randn(clusters, features, generator=draws)
    noise = torch.randn(size, features, generator=draws)
    return normalize(noise + centres[torch.randint(clusters, (size,), generator=draws)], dim=1)


def cluster(
    rows: Tensor, on_cpu: Tensor, clusters: int, restarts: int, metric: str, code: Path | None
) -> dict[str, Work]:
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

    def by_faiss() -> object:
        return faiss.Kmeans(
            rows.shape[1],
            clusters,
            niter=ITERATIONS,
            nredo=restarts,
            spherical=metric == "cosine",
            max_points_per_centroid=10**9,
            early_stop_threshold=-1.0,
        ).train(on_cpu.numpy())

    def scikit() -> object:
        return KMeans(clusters, n_init=restarts, max_iter=ITERATIONS, tol=0, algorithm="lloyd").fit(on_cpu.numpy())

    def authors() -> object:
        theirs = importlib.import_module("torch_clustering.kmeans").PyTorchKMeans
        return theirs(
            metric, n_clusters=clusters, n_init=restarts, max_iter=ITERATIONS, tol=0.0, verbose=False
        ).fit_predict(rows)

    works: dict[str, Work] = {"ours": ours, "seeding": seeding}
    large = len(rows) >= 10**6
    if rows.is_cpu or not large:
        works["faiss"] = by_faiss
    if metric == "euclidean" and not large:
        works["scikit-learn"] = scikit
    if code is not None:
        bare_packages(code, "torch_clustering")
        works["authors' code"] = authors
    return works


def search(rows: Tensor, on_cpu: Tensor, neighbours: int) -> dict[str, Work]:
    def theirs() -> object:
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(on_cpu.numpy())
        return index.search(on_cpu.numpy(), neighbours)

    return {
        "ours": lambda: nearest_neighbors(rows, rows, neighbours, metric="inner_product", exclude=None),
        "faiss": theirs,
    }


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--large", action="store_true", help="with ImageNet's size; on a GPU always")
    parser.add_argument("--code", type=Path, help="a copy of the authors' k-means, timed as well")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    faiss.omp_set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large = LARGE if given.large or device.type == "cuda" else []
    rows = close_clusters(20_000, 128, 10)
    cases: dict[str, dict[str, Work]] = {"20 nearest of 20,000 x 128": search(rows.to(device), rows, 20)}
    for size, features, clusters, restarts in [*CASES, *large]:
        rows = close_clusters(size, features, clusters)
        for metric in ("cosine", "euclidean"):
            name = f"k-means, {metric}, {size:,} x {features}, K = {clusters}, {restarts} restart(s)"
            cases[name] = cluster(rows.to(device), rows, clusters, restarts, metric, given.code)

    figures: dict[str, Any] = {}
    about = {"iterations": ITERATIONS, "faiss": faiss.__version__, "device": str(device)}
    lines = []
    for name, works in cases.items():
        with threadpool_limits(given.threads):
            seconds = in_turns(works, rounds=given.rounds, device=device)
        medians = {who: statistics.median(taken) for who, taken in seconds.items()}
        ratios = {who: ratio(seconds["ours"], seconds[who]) for who in OTHERS if who in seconds}
        figures[name] = {"seconds": medians, "ours_over": ratios, "rounds": seconds}
        columns = [medians.get(who, "") for who in ("ours", "seeding", *OTHERS)]
        lines.append([name, *columns, *(ratios.get(who, "") for who in OTHERS)])
        print(f"{name}: {medians['ours']:.3f} s, " + ", ".join(f"{x:.2f} times {who}" for who, x in ratios.items()))
        save(about | {"cases": figures}, __file__, given.out)
    table(["seconds", "ours", "seeding", *OTHERS, *(f"ours / {who}" for who in OTHERS)], lines)


if __name__ == "__main__":
    main()
