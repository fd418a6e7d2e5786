"""k-means++ on a sample of the rows against all rows: how much inertia it costs, and what time it saves.

    python benchmarks/seeding.py --data DIR [--seeds 10]

For each data set, k-means runs with one restart from each of the seeds, once seeded from SAMPLED_ROWS_PER_CLUSTER rows
for each cluster and once from all of them. The figures are the ratio of the two inertias: of their means, and its
standard error over the seeds, in percent. DIR holds USPS and MNIST as `deepclust train` reads them; the digits are
embedded. No labels are read.
"""

import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from measure import compose_train, make_argument_parser, print_table, save_figures
from torch import Tensor
from torch.nn.functional import avg_pool2d

from deepclust.clustering.backend import EXACT, SAMPLED_ROWS_PER_CLUSTER, clustering_settings
from deepclust.clustering.kmeans import kmeans
from deepclust.config.build import build

CASES = [("digits", 1797, 20), ("usps", 9298, 50), ("mnist", 20_000, 100)]  # data set, rows, clusters


def read_pixels(name: str, num_rows: int, data_dir: Path) -> Tensor:
    """Return the first rows of a data set as vectors (M, D) of pixels, pooled to half the side where it is 28."""
    images = build(compose_train(f"dataset={name}", f"data_dir={data_dir}").dataset.source).fit
    pixels = images.read(torch.arange(num_rows).numpy()).float() / 255
    if pixels.shape[-1] == pixels.shape[-2] == 28:
        pixels = avg_pool2d(pixels, 2)
    return pixels.flatten(1)


def main() -> None:
    parser = make_argument_parser(__doc__, rounds=1)
    parser.add_argument("--data", type=Path, required=True, help="the folder of USPS and MNIST")
    parser.add_argument("--seeds", type=int, default=10, help="number of restarts that are compared")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures, table = {}, []
    for name, num_rows, num_clusters in CASES:
        rows = read_pixels(name, num_rows, args.data)
        for metric in ("cosine", "euclidean"):
            inertias: dict[str, list[float]] = {"all": [], "sample": []}
            seconds = dict.fromkeys(inertias, 0.0)
            for seed in range(args.seeds):
                for kind, per_cluster in ("all", None), ("sample", SAMPLED_ROWS_PER_CLUSTER):
                    started_at = time.process_time()
                    with clustering_settings(**asdict(replace(EXACT, seeding_rows_per_cluster=per_cluster))):
                        result = kmeans(
                            rows,
                            num_clusters=num_clusters,
                            metric=metric,
                            restarts=[0],
                            max_iterations=300,
                            tolerance=1e-4,
                            key=("seeding", seed),
                        )
                    seconds[kind] += time.process_time() - started_at
                    inertias[kind].append(result.inertia)
            mean = statistics.mean(inertias["all"])
            excess = [100 * (a - b) / mean for a, b in zip(inertias["sample"], inertias["all"], strict=True)]
            error = statistics.stdev(excess) / len(excess) ** 0.5
            spread = 100 * statistics.stdev(inertias["all"]) / mean
            case = f"{name}, {metric}, {num_rows:,} x {rows.shape[1]}, K = {num_clusters}"
            figures[case] = {
                "sampled_rows": SAMPLED_ROWS_PER_CLUSTER * num_clusters,
                "excess_percent": statistics.mean(excess),
                "standard_error": error,
                "spread_of_full_seeding_percent": spread,
                "inertias": inertias,
                "cpu_seconds": seconds,
            }
            table.append([case, statistics.mean(excess), error, spread, seconds["sample"] / seconds["all"]])
            print(f"{case}: {statistics.mean(excess):+.3f} +- {error:.3f} %", flush=True)
            save_figures({"rows_per_cluster": SAMPLED_ROWS_PER_CLUSTER, "cases": figures}, __file__, args.out)
    print_table(["inertia, sample over all", "excess %", "error", "spread of all %", "CPU time"], table)


if __name__ == "__main__":
    main()
