"""k-means and nearest neighbours: ours against faiss, scikit-learn and the code that ProPos's authors use.

    python benchmarks/estep.py [--threads 1] [--rounds 5] [--large] [--code DIR]

All sides take turns on the same rows in one process, and figures are medians over the rounds.

- k-means does the same number of iterations and restarts on all sides. The clusters lie so close together that no
  restart converges earlier. All sides use all rows (by default faiss would use 256 for each cluster).
- Ours, scikit-learn and the authors' code seed by greedy k-means++, and their times include it; the column "seeding"
  gives ours by itself. faiss starts from random rows.
- On a GPU, ours and the authors' code run on the GPU, and the others on the CPU.
- DIR is a copy of github.com/Hzzone/torch_clustering, which the authors' E-step calls.
"""

import importlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import torch
from measure import (
    make_argument_parser,
    median_ratio,
    print_table,
    save_figures,
    skip_package_init,
    time_interleaved,
)
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.kmeans_seeding import seed_kmeans_plus_plus
from deepclust.clustering.neighbors import nearest_neighbors

ITERATIONS = 20
KMEANS_CASES = [  # (rows, features, clusters, restarts)
    (1_797, 256, 10, 10),
    (60_000, 256, 10, 10),
    (60_000, 256, 200, 1),
]
LARGE_KMEANS_CASES = [(1_281_167, 256, 1000, 1)]  # the size of ImageNet
COMPETITORS = "faiss", "scikit-learn", "authors' code"
TimedFunction = Callable[[], object]


def make_close_clusters(num_rows: int, num_features: int, num_clusters: int) -> Tensor:
    """Return unit rows (M, D) of clusters whose centres are hardly further apart than the rows of one cluster."""
    generator = torch.Generator().manual_seed(0)
    centres = 0.1 * torch.randn(num_clusters, num_features, generator=generator)
    noise = torch.randn(num_rows, num_features, generator=generator)
    return normalize(noise + centres[torch.randint(num_clusters, (num_rows,), generator=generator)], dim=1)


def kmeans_functions(
    rows: Tensor, cpu_rows: Tensor, num_clusters: int, restarts: int, metric: str, code: Path | None
) -> dict[str, TimedFunction]:
    """Return the functions that cluster the rows (M, D), on the device and on the CPU, and that only seed."""

    def run_ours() -> object:
        return kmeans(
            rows,
            num_clusters=num_clusters,
            metric=metric,  # type: ignore[arg-type]
            restarts=range(restarts),
            max_iterations=ITERATIONS,
            tolerance=0.0,
            key=("benchmark",),
        )

    def run_our_seeding() -> object:
        num_candidates = 2 + int(torch.tensor(num_clusters).log())
        generator = torch.Generator().manual_seed(0)
        first_seeds = torch.randint(len(rows), (restarts,), generator=generator)
        uniforms = torch.rand(restarts, num_clusters - 1, num_candidates, generator=generator)
        return seed_kmeans_plus_plus(rows, first_seeds, uniforms, metric=metric)  # type: ignore[arg-type]

    def run_faiss() -> object:
        return faiss.Kmeans(
            rows.shape[1],
            num_clusters,
            niter=ITERATIONS,
            nredo=restarts,
            spherical=metric == "cosine",
            max_points_per_centroid=10**9,
            early_stop_threshold=-1.0,
        ).train(cpu_rows.numpy())

    def run_scikit_learn() -> object:
        estimator = KMeans(num_clusters, n_init=restarts, max_iter=ITERATIONS, tol=0, algorithm="lloyd")
        return estimator.fit(cpu_rows.numpy())

    def run_authors_code() -> object:
        kmeans_class = importlib.import_module("torch_clustering.kmeans").PyTorchKMeans
        return kmeans_class(
            metric, n_clusters=num_clusters, n_init=restarts, max_iter=ITERATIONS, tol=0.0, verbose=False
        ).fit_predict(rows)

    functions: dict[str, TimedFunction] = {"ours": run_ours, "seeding": run_our_seeding}
    is_large = len(rows) >= 10**6
    if rows.is_cpu or not is_large:
        functions["faiss"] = run_faiss
    if metric == "euclidean" and not is_large:
        functions["scikit-learn"] = run_scikit_learn
    if code is not None:
        skip_package_init(code, "torch_clustering")
        functions["authors' code"] = run_authors_code
    return functions


def nearest_neighbor_functions(rows: Tensor, cpu_rows: Tensor, num_neighbors: int) -> dict[str, TimedFunction]:
    """Return the functions that find the nearest neighbours of each row (M, D), on the device and on the CPU."""

    def run_ours() -> object:
        return nearest_neighbors(rows, rows, num_neighbors, metric="inner_product", exclude=None)

    def run_faiss() -> object:
        index = faiss.IndexFlatIP(rows.shape[1])
        index.add(cpu_rows.numpy())
        return index.search(cpu_rows.numpy(), num_neighbors)

    return {"ours": run_ours, "faiss": run_faiss}


def main() -> None:
    parser = make_argument_parser(__doc__, rounds=5)
    parser.add_argument("--large", action="store_true", help="add ImageNet's size (on a GPU it is always there)")
    parser.add_argument("--code", type=Path, help="a copy of the authors' k-means, which is then timed as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large_cases = LARGE_KMEANS_CASES if args.large or device.type == "cuda" else []
    rows = make_close_clusters(20_000, 128, 10)
    cases = {"20 nearest of 20,000 x 128": nearest_neighbor_functions(rows.to(device), rows, 20)}
    for num_rows, num_features, num_clusters, restarts in [*KMEANS_CASES, *large_cases]:
        rows = make_close_clusters(num_rows, num_features, num_clusters)
        for metric in ("cosine", "euclidean"):
            case = f"k-means, {metric}, {num_rows:,} x {num_features}, K = {num_clusters}, {restarts} restart(s)"
            cases[case] = kmeans_functions(rows.to(device), rows, num_clusters, restarts, metric, args.code)

    setup = {"iterations": ITERATIONS, "faiss": faiss.__version__, "device": str(device)}
    figures: dict[str, Any] = {}
    table_rows = []
    for case, functions in cases.items():
        with threadpool_limits(args.threads):
            seconds = time_interleaved(functions, rounds=args.rounds, device=device)
        medians = {name: statistics.median(rounds) for name, rounds in seconds.items()}
        ratios = {name: median_ratio(seconds["ours"], seconds[name]) for name in COMPETITORS if name in seconds}
        figures[case] = {"seconds": medians, "ours_over": ratios, "rounds": seconds}
        columns = [medians.get(name, "") for name in ("ours", "seeding", *COMPETITORS)]
        table_rows.append([case, *columns, *(ratios.get(name, "") for name in COMPETITORS)])
        print(f"{case}: {medians['ours']:.3f} s, " + ", ".join(f"{x:.2f} times {name}" for name, x in ratios.items()))
        save_figures(setup | {"cases": figures}, __file__, args.out)
    header = ["seconds", "ours", "seeding", *COMPETITORS, *(f"ours / {name}" for name in COMPETITORS)]
    print_table(header, table_rows)


if __name__ == "__main__":
    main()
