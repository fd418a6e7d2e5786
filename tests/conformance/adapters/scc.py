"""SCC: quantities of the authors' code and of its formulas, computed with the functions that training uses."""

import math

import numpy as np
import torch

from deepclust.backbones.identity import Identity
from deepclust.clustering.cluster_tree import count_clusters
from deepclust.clustering.dendrogram_purity import dendrogram_purity
from deepclust.clustering.flat_cuts import best_level, compute_modularities, exact_cut, nearest_cut
from deepclust.clustering.neighbor_graph import NeighborGraph, build_cosine_graph
from deepclust.clustering.subcluster_components import agglomerate
from deepclust.methods.scc import SCC
from deepclust.metrics import ContingencyTable, compute_scores


def make_method(params, *, num_images=1, num_features=1, variant="scc", num_rounds=1):
    """Return a method whose backbone gives vectors back."""
    return SCC(
        backbone=Identity(in_channels=num_features, image_size=1),
        num_images=num_images,
        num_clusters=params.get("num_clusters", "auto"),
        k=params.get("k", 25),
        num_rounds=params.get("num_rounds", num_rounds),
        upper=params.get("upper", "auto"),
        lower=params.get("lower", "auto"),
        variant=variant,
        cut="nearest",
    )


def make_graph(inputs, num_nodes):
    """Return the graph of the stored edges, both directions of which are there in order."""
    starts = torch.searchsorted(inputs["row"], torch.arange(num_nodes + 1))
    return NeighborGraph(starts=starts, neighbors=inputs["col"], weights=inputs["similarity"].double())


def describe_rounds(partitions):
    return {"partitions": partitions, "num_clusters": count_clusters(partitions)[1:]}


def knn_graph(params, inputs):
    return {"graph": build_cosine_graph(inputs["features"], params["k"]).dense()}


def thresholds(params, inputs):
    return {"thresholds": make_method(params).choose_thresholds(graph=None)}


def rounds(params, inputs):
    graph = make_graph(inputs, params["num_nodes"])
    return describe_rounds(agglomerate(graph, inputs["thresholds"].numpy(), only_mutual=False))


def rounds_of_variant(variant):
    def run(params, inputs):
        method = make_method(params, variant=variant, num_rounds=params["max_rounds"])
        return describe_rounds(method.agglomerate(make_graph(inputs, params["num_nodes"]))[0])

    return run


def flat_partition(params, inputs):
    return {"labels": nearest_cut(inputs["partitions"].numpy(), params["num_clusters"])}


def exact_partition(params, inputs):
    partitions = inputs["partitions"].numpy()
    graph = make_graph(inputs, partitions.shape[1])
    return {"labels": exact_cut(partitions, params["num_clusters"], graph, inputs["features"].numpy())}


def purity(params, inputs):
    value = dendrogram_purity(inputs["partitions"].numpy(), inputs["classes"].numpy())
    return {"purity": torch.tensor(math.nan if value is None else value, dtype=torch.float64)}


def modularity(params, inputs):
    partitions = inputs["partitions"].numpy()
    values = compute_modularities(partitions, make_graph(inputs, params["num_nodes"]))
    return {"modularity": values, "num_clusters": count_clusters(partitions)[best_level(values)]}


def pipeline(params, inputs):
    """Run the method's E-step on vectors and score what it found."""
    rows, classes = inputs["images"].float(), inputs["classes"]
    method = make_method(params, num_images=len(rows), num_features=rows.shape[1])
    method.e_step(rows, ("test",))
    tree, labels = method.cluster_tree(), method.assignments
    metric = ContingencyTable(num_clusters=method.num_clusters, num_classes=int(classes.max()) + 1)
    metric.update(labels, classes)
    scores = compute_scores(metric.table[:-1])
    scores["purity"] = dendrogram_purity(tree.partitions, classes.numpy())
    return {
        "num_clusters": count_clusters(tree.partitions)[1:],
        "labels": labels,
        "scores": np.array([scores[name] for name in ("acc", "nmi", "ari", "purity")]),
    }


ADAPTERS = {
    "knn_graph": knn_graph,
    "thresholds": thresholds,
    "rounds": rounds,
    "affinity_rounds": rounds_of_variant("affinity"),
    "reciprocal_rounds": rounds_of_variant("reciprocal"),
    "flat_partition": flat_partition,
    "exact_partition": exact_partition,
    "dendrogram_purity": purity,
    "modularity": modularity,
    "pipeline": pipeline,
}
