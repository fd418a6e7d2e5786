"""How often rules that name a number of clusters are right: on labelled data, chosen on one half, judged on the other.

    python benchmarks/number_of_clusters.py --data DATA_DIR --features DIR [--sets NAME ...]

DATA_DIR holds the arrays of USPS, MNIST, Pendigits, Imagenette at 64 px, CIFAR-10 and CIFAR-100, as deepclust keeps
them (`DATA_DIR/usps/train_images.npy` and so on). DIR keeps the features, and what the rules name for each set, so that
an interrupted call goes on. `--sets` computes some sets only; the table comes once all are there.

- Digits are given as pixels, photos as features of EfficientNet-Lite2 or -Lite0. Rows are drawn at random with seed 0,
  as many of each class, and everything is computed on their first 50 principal components, as in
  deepclust/clustering/number_of_clusters.py.
- The sets of SETS belong to the two halves in turn. A combination of up to three rules says the median of what they
  name, of two the geometric mean. The one that is within 10 % of the number of classes most often on one half, and of
  equals the nearer one (mean of |log K / truth|), is judged on the other half, and the other way round.
- The labels serve for this comparison only.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from measure import make_argument_parser, print_table, save_figures
from scipy.cluster.hierarchy import linkage
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score, davies_bouldin_score, silhouette_score
from torch import Tensor
from torch.nn.functional import interpolate

from deepclust.backbones.pretrained import timm_model
from deepclust.clustering.kmeans_distances import nearest_centroids
from deepclust.clustering.neighbor_graph import build_neighbor_graph
from deepclust.clustering.number_of_clusters import (
    COARSE,
    FINE,
    NUM_NEIGHBORS,
    build_graph,
    estimate_number_of_clusters,
    find_communities,
    numbers_to_try,
    project_on_principal_components,
    run_kmeans,
)
from deepclust.engine.randomness import make_generator

SEED, WITHIN = 0, 0.1
LITE0, LITE2 = "tf_efficientnet_lite0", "tf_efficientnet_lite2"
PER_CLASS = {"digits": 200, "usps": 120, "mnist": 120, "pendigits": 120, "imagenette64": 150, "cifar10": 150}
MAX_CLUSTERS = 60
NUM_SUBSAMPLES, SUBSAMPLE_SHARE, MIN_STABILITY_GAP = 4, 0.7, 0.5
GAP_MARGIN = 0.005  # of the gap statistic, in place of its standard error


@dataclass(frozen=True)
class LabelledSet:
    """Some classes of a data set, as pixels or as features of a network."""

    name: str
    data: str
    network: str | None
    first_class: int  # in the order of the classes, which for CIFAR-100 is drawn at random
    last_class: int

    @property
    def num_classes(self) -> int:
        return self.last_class - self.first_class


SETS = [  # the first, third ... to choose a rule on, the others to judge it on
    LabelledSet("digits", "digits", None, 0, 10),
    LabelledSet("USPS", "usps", None, 0, 10),
    LabelledSet("MNIST", "mnist", None, 0, 10),
    LabelledSet("Pendigits", "pendigits", None, 0, 10),
    LabelledSet("Imagenette, Lite2", "imagenette64", LITE2, 0, 10),
    LabelledSet("Imagenette, Lite0", "imagenette64", LITE0, 0, 10),
    LabelledSet("CIFAR-10, Lite2", "cifar10", LITE2, 0, 10),
    LabelledSet("CIFAR-10, Lite0", "cifar10", LITE0, 0, 10),
    LabelledSet("Imagenette, 3 classes, Lite2", "imagenette64", LITE2, 0, 3),
    LabelledSet("Imagenette, 7 classes, Lite0", "imagenette64", LITE0, 3, 10),
    LabelledSet("CIFAR-100, 20 classes, Lite0", "cifar100", LITE0, 0, 20),
    LabelledSet("CIFAR-100, 20 others, Lite0", "cifar100", LITE0, 30, 50),
    LabelledSet("CIFAR-100, 10 classes, Lite0", "cifar100", LITE0, 20, 30),
    LabelledSet("CIFAR-10, 5 classes, Lite0", "cifar10", LITE0, 0, 5),
    LabelledSet("CIFAR-100, 50 classes, Lite0", "cifar100", LITE0, 0, 50),
    LabelledSet("CIFAR-100, 35 classes, Lite0", "cifar100", LITE0, 0, 35),
    LabelledSet("MNIST, 4 classes", "mnist", None, 2, 6),
    LabelledSet("USPS, 5 classes", "usps", None, 0, 5),
]


def draw_rows(labels: np.ndarray, classes: Sequence[int], per_class: int) -> np.ndarray:
    """Return the indices of `per_class` rows of each class, or all where there are fewer."""
    rng = np.random.default_rng(SEED)
    return np.concatenate([np.sort(rng.permutation(np.flatnonzero(labels == c))[:per_class]) for c in classes])


def load_rows(labelled: LabelledSet, data_dir: Path, features_dir: Path) -> Tensor:
    """Return the rows (M, D) of a set."""
    if labelled.data == "digits":
        digits = load_digits()
        vectors, labels = digits.data / 16, digits.target
    elif labelled.network is not None:
        file = features_dir / f"{labelled.data}-{labelled.network}.npy"
        labels_file = features_dir / f"{labelled.data}-{labelled.network}-labels.npy"
        if not file.exists():
            make_features(labelled.data, labelled.network, data_dir, file, labels_file)
        vectors, labels = np.load(file), np.load(labels_file)
        order = list(dict.fromkeys(labels.tolist()))
        keep = np.isin(labels, order[labelled.first_class : labelled.last_class])
        return torch.from_numpy(vectors[keep])
    else:
        kind = "features" if labelled.data == "pendigits" else "images"
        vectors = np.load(data_dir / labelled.data / f"train_{kind}.npy", mmap_mode="r")
        labels = np.load(data_dir / labelled.data / "train_labels.npy")
    rows = draw_rows(labels, range(labelled.first_class, labelled.last_class), PER_CLASS[labelled.data])
    return torch.from_numpy(np.stack([np.ravel(vectors[row]) for row in rows]).astype(np.float32))


@torch.no_grad()
def make_features(data: str, network_name: str, data_dir: Path, file: Path, labels_file: Path) -> None:
    """Write the features of a network for images of a data set, and their labels.

    Of CIFAR-100 they are 40 images of each of 50 classes. Images are enlarged to the size that the network takes.
    """
    labels = np.load(data_dir / data / "train_labels.npy")
    images = np.load(data_dir / data / "train_images.npy", mmap_mode="r")
    classes = np.random.default_rng(SEED).permutation(100)[:50] if data == "cifar100" else range(10)
    rows = draw_rows(labels, list(classes), PER_CLASS.get(data, 40))
    network = timm_model(model_name=network_name, pretrained=True, weights=None, num_classes=0).eval()
    size = {LITE0: 224, LITE2: 260}[network_name]
    features = []
    for batch in np.array_split(rows, -(-len(rows) // 50)):
        pixels = torch.from_numpy(np.stack([images[row] for row in batch])).permute(0, 3, 1, 2).float() / 255
        pixels = interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        features.append(network((pixels - 0.5) / 0.5).numpy())
    np.save(labels_file, labels[rows])
    np.save(file, np.concatenate(features))


def name_numbers(features: Tensor) -> dict[str, int]:
    """Return the number of clusters that each rule names for the rows (M, D)."""
    rows = project_on_principal_components(features)
    reference = torch.randn(rows.shape, generator=make_generator(SEED, "one cloud")).to(rows) * rows.std(0)
    named = name_by_reference(rows, reference)
    max_clusters = min(MAX_CLUSTERS, len(rows) // 10)
    numbers = numbers_to_try(max_clusters)
    neighbor_graph = build_neighbor_graph(rows, NUM_NEIGHBORS + 1)
    shape = (len(rows), len(rows))
    indices = neighbor_graph.neighbors.numpy()
    graph = csr_matrix((np.ones(len(indices)), indices, neighbor_graph.starts.numpy()), shape=shape)
    gaps, scores, modularities = [], [], []
    for k in numbers:
        model, of_reference = (
            KMeans(k, n_init=2, max_iter=60, random_state=SEED).fit(x) for x in (rows.numpy(), reference.numpy())
        )
        gaps.append(float(np.log(of_reference.inertia_) - np.log(model.inertia_)))
        scores.append(float(davies_bouldin_score(rows, model.labels_)))
        modularities.append(compute_modularity(graph, model.labels_))
    named["gap statistic"] = next(
        (k for k, gap, following in zip(numbers, gaps, gaps[1:], strict=False) if gap >= following - GAP_MARGIN),
        numbers[-1],
    )
    named["Davies-Bouldin index"] = numbers[int(np.argmin(scores))]
    named["modularity of k-means"] = pick_number(list(zip(numbers, modularities, strict=True)), margin=-np.inf, tie=0)
    communities = find_communities(build_graph(rows), SEED)
    named["communities"], named["modularity (Louvain)"] = communities[COARSE][0], communities[FINE][0]
    named["modularity of the tree (SCC)"] = count_by_tree(graph)
    named["merge ratio (Ward)"] = find_largest_merge_ratio(rows, max_clusters)
    named["eigengap"] = find_eigengap(neighbor_graph.dense(), max_clusters)
    found = HDBSCAN(min_cluster_size=15, min_samples=5, copy=True).fit(rows.numpy())
    named["HDBSCAN"] = max(1, int(found.labels_.max()) + 1)
    return named


def name_by_reference(rows: Tensor, reference: Tensor) -> dict[str, int]:
    """Return the K at which silhouette and stability of k-means are the furthest above those of one normal cloud.

    Stability is the share that it closes of the gap between the reference and 1, which counts at least
    MIN_STABILITY_GAP; of nearly equal values the largest K is taken, since two groups of groups are as stable as the
    groups.
    """
    numbers = numbers_to_try(min(50, len(rows) // 10))
    of_rows, of_reference = (compute_silhouettes_and_stabilities(x, numbers, SEED) for x in (rows, reference))
    silhouettes = [(k, a - b) for k, a, b in zip(numbers, of_rows[0], of_reference[0], strict=True)]
    stabilities = [
        (k, (a - b) / max(1 - b, MIN_STABILITY_GAP))
        for k, a, b in zip(numbers, of_rows[1], of_reference[1], strict=True)
    ]
    return {
        "silhouette": pick_number(silhouettes, margin=0.05, tie=0),
        "stability": pick_number(stabilities, margin=0.3, tie=0.02),
    }


def compute_silhouettes_and_stabilities(
    rows: Tensor, numbers: Sequence[int], seed: int
) -> tuple[list[float], list[float]]:
    """Return the silhouette and the stability of k-means on `rows` (M, D), for each number of clusters."""
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    subsample_size = int(SUBSAMPLE_SHARE * len(rows))
    subsamples = [
        torch.randperm(len(rows), generator=make_generator(seed, "part of the rows", number))[:subsample_size]
        for number in range(NUM_SUBSAMPLES)
    ]
    silhouettes, stabilities = [], []
    for k in numbers:
        assignments = run_kmeans(rows, k, seed).assignments
        if assignments.unique().numel() > 1:
            silhouettes.append(float(silhouette_score(distances, assignments, metric="precomputed")))
        else:
            silhouettes.append(0.0)  # all rows are identical
        assignments_by_subsample = [
            nearest_centroids(rows, run_kmeans(rows[subsample], k, seed).centroids, metric="euclidean")[0]
            for subsample in subsamples
        ]
        pairs = combinations(assignments_by_subsample, 2)
        stabilities.append(mean(float(adjusted_rand_score(a, b)) for a, b in pairs))
    return silhouettes, stabilities


def pick_number(curve: list[tuple[int, float]], *, margin: float, tie: float) -> int:
    """Return the largest K whose value is at most `tie` below the best one; 1 where no value is above `margin`."""
    best = max(value for _, value in curve)
    if best <= margin:
        return 1
    return max(k for k, value in curve if value >= best - tie)


def compute_modularity(graph: csr_matrix, assignments: np.ndarray) -> float:
    """Return the modularity of a partition (M,) of a symmetric graph (M, M)."""
    membership = csr_matrix((np.ones(len(assignments)), (np.arange(len(assignments)), assignments)))
    weights = (membership.T @ graph @ membership).toarray() / graph.sum()
    return float(np.trace(weights) - (weights.sum(1) ** 2).sum())


def count_by_tree(graph: csr_matrix, num_rounds: int = 100) -> int:
    """Return the number of clusters, of the rounds of SCC (Monath et al. 2021) on a graph, with the largest modularity.

    In each round, every cluster joins the one with the largest mean weight to it, if that reaches a falling threshold.
    """
    sums, sizes, assignments = graph.copy(), np.ones(graph.shape[0]), np.arange(graph.shape[0])
    best_modularity, best_number = -1.0, len(assignments)
    for threshold in np.geomspace(1, 4 / graph.shape[0] ** 2, num_rounds):
        edges = sums.tocoo()
        means = edges.data / (sizes[edges.row] * sizes[edges.col])
        is_linked = means >= threshold
        if not is_linked.any():
            continue
        sources, targets = edges.row[is_linked], edges.col[is_linked]
        order = np.lexsort((targets, -means[is_linked], sources))
        sources, first = np.unique(sources[order], return_index=True)
        links = csr_matrix((np.ones(len(sources)), (sources, targets[order][first])), shape=sums.shape)
        number, joined = connected_components(links, directed=True, connection="weak")
        membership = csr_matrix((np.ones(len(joined)), (np.arange(len(joined)), joined)), shape=(len(joined), number))
        sums, sizes = (membership.T @ sums @ membership).tolil(), membership.T @ sizes
        sums.setdiag(0)
        sums = sums.tocsr()
        sums.eliminate_zeros()
        assignments = joined[assignments]
        modularity = compute_modularity(graph, assignments)
        if modularity > best_modularity:
            best_modularity, best_number = modularity, number
    return best_number


def find_largest_merge_ratio(rows: Tensor, max_clusters: int) -> int:
    """Return the K at which the height of Ward's next merge is largest, as a multiple of the height of the last one."""
    heights = linkage(rows.double().numpy(), "ward")[::-1, 2]  # from 2 clusters to 1, from 3 to 2 and so on
    ratios = heights[: max_clusters - 1] / heights[1:max_clusters]
    return int(np.argmax(ratios)) + 2


def find_eigengap(weights: Tensor, max_clusters: int) -> int:
    """Return the K after which the eigenvalues of the normalised Laplacian have the largest gap but the first."""
    scale = weights.sum(1).clamp(min=1e-12).rsqrt()
    normalised = scale[:, None] * weights * scale
    eigenvalues = 1 - torch.linalg.eigvalsh((normalised + normalised.T) / 2).flip(0)
    return int(eigenvalues[: max_clusters + 1].diff()[1:].argmax()) + 2


def combine_rules(named: dict[str, Any], rules: Sequence[str]) -> int:
    """Return the median of what the rules name, on a logarithmic scale: of two the geometric mean."""
    return round(float(np.exp(np.median(np.log([named[rule] for rule in rules])))))


def judge(
    say: Callable[[dict[str, Any]], int], sets: Sequence[tuple[LabelledSet, dict[str, Any]]]
) -> tuple[int, float]:
    """Return how many sets a rule is right on, within WITHIN of the number of classes, and its mean |log K / truth|."""
    hits = sum(is_right(say(named), labelled) for labelled, named in sets)
    return hits, mean(abs(float(np.log(say(named) / labelled.num_classes))) for labelled, named in sets)


def compare_rules(results: list[tuple[LabelledSet, dict[str, Any]]]) -> dict[str, Any]:
    """Return the table of all rules, the combination chosen on each half, and what deepclust says."""
    halves = results[::2], results[1::2]
    rules = [rule for rule in results[0][1] if rule != "deepclust"]
    found = [c for size in (1, 2, 3) for c in combinations(rules, size)]
    rows: dict[str, Sequence[str]] = {rule: [rule] for rule in rules}
    rows["silhouette, stability, eigengap: median"] = ("silhouette", "stability", "eigengap")
    for name, half in zip(("first", "second"), halves, strict=True):

        def rank(combination: Sequence[str], half: list = half) -> tuple[int, float]:
            hits, error = judge(partial(combine_rules, rules=combination), half)
            return -hits, error

        chosen = min(found, key=rank)
        rows[f"chosen on the {name} half: {', '.join(chosen)}"] = chosen
    says: dict[str, Callable[[dict[str, Any]], int]]
    says = {title: partial(combine_rules, rules=combination) for title, combination in rows.items()}
    says["what deepclust says"] = lambda named: named["deepclust"]["num_clusters"]
    table = {}
    for title, say in says.items():
        judged = [judge(say, half) for half in halves]
        table[title] = {
            "said": {labelled.name: say(named) for labelled, named in results},
            "right": [hits for hits, _ in judged],
            "mean_log_error": [error for _, error in judged],
        }
    return {
        "num_sets": [len(half) for half in halves],
        "table": table,
        "sure": count_right(results, lambda said: said["is_sure"]),
        "unsure": count_right(results, lambda said: not said["is_sure"]),
        "one_of_the_candidates": sum(
            any(is_right(k, labelled) for k in named["deepclust"]["candidates"]) for labelled, named in results
        ),
        "estimates": {labelled.name: named["deepclust"] for labelled, named in results},
    }


def count_right(results: list[tuple[LabelledSet, dict[str, Any]]], belongs: Callable[[dict], bool]) -> list[int]:
    """Return how often deepclust is right on some of the sets, and how many they are."""
    some = [(labelled, named["deepclust"]) for labelled, named in results if belongs(named["deepclust"])]
    return [sum(is_right(said["num_clusters"], labelled) for labelled, said in some), len(some)]


def is_right(k: int, labelled: LabelledSet) -> bool:
    """Return whether a number is within WITHIN of the number of classes."""
    return abs(k - labelled.num_classes) <= WITHIN * labelled.num_classes


def main() -> None:
    parser = make_argument_parser(__doc__, rounds=1)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--features", type=Path, required=True, help="the folder that keeps features and results")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="compute these only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    arguments.features.mkdir(parents=True, exist_ok=True)
    results = []
    for labelled in SETS:
        file = arguments.features / f"numbers-{labelled.name}.json"
        if not file.exists():
            if arguments.sets and labelled.name not in arguments.sets:
                continue
            features = load_rows(labelled, arguments.data, arguments.features)
            named: dict[str, Any] = name_numbers(features)
            estimate = estimate_number_of_clusters(features, seed=SEED)
            candidates = [candidate.num_clusters for candidate in estimate.candidates]
            said = {"num_clusters": estimate.num_clusters, "is_sure": estimate.is_sure, "candidates": candidates}
            named["deepclust"] = said
            file.write_text(json.dumps(named))
            print(labelled.name, labelled.num_classes, named, flush=True)
        results.append((labelled, json.loads(file.read_text())))
    if len(results) < len(SETS):
        return
    figures = compare_rules(results)
    columns = ["rule", *(f"{labelled.name} ({labelled.num_classes})" for labelled in SETS), "right", "error"]
    print_table(
        columns,
        [
            [
                *(title, *map(str, row["said"].values())),
                " | ".join(f"{hits}/{total}" for hits, total in zip(row["right"], figures["num_sets"], strict=True)),
                " | ".join(f"{error:.2f}" for error in row["mean_log_error"]),
            ]
            for title, row in figures["table"].items()
        ],
    )
    print("right where it is sure, where it is not:", figures["sure"], figures["unsure"])
    print("right with one of its candidates:", figures["one_of_the_candidates"])
    save_figures(figures, "number_of_clusters", arguments.out)


if __name__ == "__main__":
    main()
