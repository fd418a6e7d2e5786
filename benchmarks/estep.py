"""k-means and nearest neighbours: ours against faiss, scikit-learn and the code that ProPos's authors use.

    python benchmarks/estep.py [--threads 1] [--rounds 5] [--large] [--only TEXT] [--code DIR]

All sides take turns on the same rows in one process, and figures are medians over the rounds. On a CPU they are CPU
seconds, which other programs on the machine disturb less than the time on the clock.

- k-means does the same number of iterations and restarts on all sides. The clusters lie so close together that no
  restart converges earlier. All sides use all rows (by default faiss would use 256 for each cluster).
- Ours, scikit-learn and the authors' code seed by greedy k-means++, and their times include it; the column "seeding"
  gives ours by itself, by default settings: at ImageNet's size on a sample. faiss starts from random rows.
- "by faiss" is ours with clustering.backend=faiss. From LARGE rows on the peak of memory of each side is recorded too,
  the rows themselves included.
- On a GPU, ours and the authors' code run on the GPU, and the others on the CPU.
- DIR is a copy of github.com/Hzzone/torch_clustering, which the authors' E-step calls.
"""

import importlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import torch
from measure import (
    make_argument_parser,
    median_ratio,
    print_table,
    read_memory,
    reset_peak_memory,
    save_figures,
    skip_package_init,
    time_interleaved,
)
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

from deepclust.clustering.backend import clustering_settings, current_settings
from deepclust.clustering.exact_products import exact_products
from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.kmeans_distances import KMeansData
from deepclust.clustering.kmeans_seeding import choose_seeds
from deepclust.clustering.neighbors import nearest_neighbors
from deepclust.config.composition import read_defaults

DEFAULTS = read_defaults("clustering")  # the settings of a run
ITERATIONS = 20
KMEANS_CASES = [  # (rows, features, clusters, restarts)
    (1_797, 256, 10, 10),
    (60_000, 256, 10, 10),
    (60_000, 256, 200, 1),
]
LARGE_KMEANS_CASES = [(200_000, 256, 1000, 1), (1_281_167, 256, 1000, 1)]  # the latter is the size of ImageNet
LARGE = 200_000  # rows from which there is no round to warm up
COMPETITORS = "faiss", "scikit-learn", "authors' code"
TimedFunction = Callable[[], object]


def make_close_clusters(num_rows: int, num_features: int, num_clusters: int) -> Tensor:
    """Return unit rows (M, D) of clusters whose centres are hardly further apart than the rows of one cluster."""
    generator = torch.Generator().manual_seed(0)
    centres = 0.1 * torch.randn(num_clusters, num_features, generator=generator)
    rows = torch.randn(num_rows, num_features, generator=generator)
    clusters = torch.randint(num_clusters, (num_rows,), generator=generator)
    for chunk, chunk_clusters in zip(rows.split(65536), clusters.split(65536), strict=True):
        chunk.add_(centres[chunk_clusters])
        normalize(chunk, dim=1, out=chunk)
    return rows


def kmeans_functions(
    rows: Tensor,
    cpu_rows: Tensor,
    num_clusters: int,
    restarts: int,
    metric: str,
    iterations: int,
    code: Path | None,
) -> dict[str, TimedFunction]:
    """Return the functions that cluster the rows (M, D), on the device and on the CPU, and that only seed."""

    def run_ours() -> object:
        return kmeans(
            rows,
            num_clusters=num_clusters,
            metric=metric,  # type: ignore[arg-type]
            restarts=range(restarts),
            max_iterations=iterations,
            tolerance=0.0,
            key=("benchmark",),
        )

    def run_our_seeding() -> object:
        data, size = KMeansData(rows, metric), current_settings().num_seeding_rows(len(rows), num_clusters)  # type: ignore[arg-type]
        data = KMeansData(rows[:size], metric) if size < len(rows) else data  # type: ignore[arg-type]
        num_candidates = 2 + int(torch.tensor(num_clusters).log())
        generator = torch.Generator().manual_seed(0)
        first_seeds = torch.randint(size, (restarts,), generator=generator)
        uniforms = torch.rand(restarts, num_clusters - 1, num_candidates, generator=generator)
        with exact_products(rows.device):
            return choose_seeds(data, first_seeds, uniforms)

    def run_ours_by_faiss() -> object:
        with clustering_settings(**DEFAULTS | {"backend": "faiss"}):
            return run_ours()

    def run_faiss() -> object:
        return faiss.Kmeans(
            rows.shape[1],
            num_clusters,
            niter=iterations,
            nredo=restarts,
            spherical=metric == "cosine",
            max_points_per_centroid=10**9,
            early_stop_threshold=-1.0,
        ).train(cpu_rows.numpy())

    def run_scikit_learn() -> object:
        estimator = KMeans(num_clusters, n_init=restarts, max_iter=iterations, tol=0, algorithm="lloyd")
        return estimator.fit(cpu_rows.numpy())

    def run_authors_code() -> object:
        kmeans_class = importlib.import_module("torch_clustering.kmeans").PyTorchKMeans
        return kmeans_class(
            metric, n_clusters=num_clusters, n_init=restarts, max_iter=iterations, tol=0.0, verbose=False
        ).fit_predict(rows)

    functions: dict[str, TimedFunction] = {"ours": run_ours, "seeding": run_our_seeding}
    is_large = len(rows) >= LARGE
    if rows.is_cpu or not is_large:
        functions["faiss"] = run_faiss
    if not is_large:
        functions["by faiss"] = run_ours_by_faiss
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

    def run_ours_by_faiss() -> object:
        with clustering_settings(**DEFAULTS | {"backend": "faiss"}):
            return run_ours()

    return {"ours": run_ours, "faiss": run_faiss, "by faiss": run_ours_by_faiss}


def watch_memory(functions: dict[str, TimedFunction], peaks: dict[str, float]) -> dict[str, TimedFunction]:
    """Return the functions such that each of them leaves this process's peak of memory in GiB, on Linux, in `peaks`."""

    def watch(name: str, function: TimedFunction) -> TimedFunction:
        def run() -> object:
            reset_peak_memory()
            result = function()
            peaks[name] = read_memory("VmHWM") / 2**30
            return result

        return run

    return {name: watch(name, function) for name, function in functions.items()}


def main() -> None:
    parser = make_argument_parser(__doc__, rounds=5)
    parser.add_argument("--large", action="store_true", help="add ImageNet's size (on a GPU it is always there)")
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="of k-means on all sides")
    parser.add_argument("--only", default="", help="run only the cases whose names contain this")
    parser.add_argument("--code", type=Path, help="a copy of the authors' k-means, which is then timed as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    large_cases = LARGE_KMEANS_CASES if args.large or device.type == "cuda" else []
    neighbor_case = "20 nearest of 20,000 x 128"
    kmeans_cases = {
        f"k-means, {metric}, {num_rows:,} x {num_features}, K = {num_clusters}, {restarts} restart(s)": (
            *(num_rows, num_features, num_clusters, restarts, metric),
        )
        for num_rows, num_features, num_clusters, restarts in [*KMEANS_CASES, *large_cases]
        for metric in ("cosine", "euclidean")
    }

    setup = {"iterations": args.iterations, "faiss": faiss.__version__, "device": str(device)}
    figures: dict[str, Any] = {}
    table_rows = []
    for case in [neighbor_case, *kmeans_cases]:
        if args.only not in case:
            continue
        peaks: dict[str, float] = {}
        is_large = False
        if case == neighbor_case:
            rows = make_close_clusters(20_000, 128, 10)
            functions = nearest_neighbor_functions(rows.to(device), rows, 20)
        else:
            num_rows, num_features, num_clusters, restarts, metric = kmeans_cases[case]
            rows = make_close_clusters(num_rows, num_features, num_clusters)
            functions = kmeans_functions(
                rows.to(device), rows, num_clusters, restarts, metric, args.iterations, args.code
            )
            is_large = num_rows >= LARGE
        if is_large and device.type == "cpu":
            functions = watch_memory(functions, peaks)
        with threadpool_limits(args.threads), clustering_settings(**DEFAULTS):
            seconds = time_interleaved(
                functions,
                rounds=args.rounds,
                device=device,
                clock=time.process_time if device.type == "cpu" else time.perf_counter,
                warm_up=not is_large,
            )
        medians = {name: statistics.median(rounds) for name, rounds in seconds.items()}
        ratios = {name: median_ratio(seconds["ours"], seconds[name]) for name in COMPETITORS if name in seconds}
        figures[case] = {"seconds": medians, "ours_over": ratios, "rounds": seconds}
        if peaks:
            figures[case]["peak_memory_gib"] = peaks
        columns = [medians.get(name, "") for name in ("ours", "seeding", "by faiss", *COMPETITORS)]
        table_rows.append([case, *columns, *(ratios.get(name, "") for name in COMPETITORS)])
        print(f"{case}: {medians['ours']:.3f} s, " + ", ".join(f"{x:.2f} times {name}" for name, x in ratios.items()))
        save_figures(setup | {"cases": figures}, __file__, args.out)
    header = ["seconds", "ours", "seeding", "by faiss", *COMPETITORS, *(f"ours / {name}" for name in COMPETITORS)]
    print_table(header, table_rows)


if __name__ == "__main__":
    main()
