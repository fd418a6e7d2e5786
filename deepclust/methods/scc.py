"""SCC: scalable hierarchical agglomerative clustering by sub-cluster components.

Monath et al., KDD 2021, arXiv 2010.11821. SCC trains nothing. It builds a tree of clusters over the features of all
images as the E-step: each image is joined to its nearest neighbours by cosine, and in rounds whole chains of clusters
become one (`deepclust.clustering.subcluster_components`). The result is a cut of the tree: into exactly K clusters,
into those of the round that comes nearest to K, or, with `num_clusters: auto`, into those of the round with the largest
modularity on the graph of neighbours, which needs no labels. Nothing is random: the seed does not matter. A new image
belongs to the cluster of the nearest image of the fit set.

Differs from the authors' code in:
- Thresholds. By default they reach so low that every connected component of the graph ends as one cluster. Those of the
  authors' example leave hundreds of clusters on thousands of images.
- Flat clusters. Their code compares the number of clusters after a round with K and returns the clusters before it.
  Cuts into exactly K clusters, and by modularity, are ours.
- Similarities of 0 or less. If there are any among neighbours, all become (1 + cosine) / 2. In their code the graph
  is no longer symmetric then.
- A graph without edges, on which their code fails: every image stays a cluster.
- Precision. Averages are in float64, theirs in float32.

Logged:
- `train/nothing`: 0 in every step. Epochs change nothing, so that `trainer.max_epochs` is 0.
"""

import logging
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from deepclust.batch import TrainBatch
from deepclust.clustering.cluster_tree import ClusterTree, partition_at
from deepclust.clustering.flat_cuts import best_level, compute_modularities, exact_cut, nearest_cut
from deepclust.clustering.neighbor_graph import NeighborGraph, build_cosine_graph
from deepclust.clustering.subcluster_components import agglomerate, choose_threshold_range
from deepclust.engine import distributed
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Constant
from deepclust.number_types import PositiveFloat, PositiveInt

log = logging.getLogger(__name__)

PRODUCTS_AT_A_TIME = 2**24  # of rows and images of the fit set
SMALLEST_SCALE = 1e-6  # of cosine distances


class SCC(ClusteringMethod):
    """SCC on the features of `backbone`, which is not trained.

    Args:
        backbone: see `ClusteringMethod`.
        num_images: number M of images that are clustered.
        num_clusters: number K of clusters; auto: that of the round with the largest modularity.
        k: number of nearest images that an image is joined to, itself included.
        num_rounds: number of thresholds, each for one round.
        upper: first threshold; auto: 1.
        lower: last threshold, to which they fall in geometric steps; auto: one that every average exceeds.
        variant: `scc`; `affinity` has no thresholds; `reciprocal` has none either and joins only clusters that are
            most similar to each other.
        cut: what a given K means: `exact`, so many clusters; `nearest`, those of the round whose number is nearest.
    """

    finds_num_clusters = True
    fit_features: Tensor
    assignments: Tensor
    members: Tensor
    partitions: Tensor
    thresholds: Tensor
    modularities: Tensor
    scale: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_images: PositiveInt,
        num_clusters: PositiveInt | Literal["auto"],
        k: PositiveInt,
        num_rounds: PositiveInt,
        upper: PositiveFloat | Literal["auto"],
        lower: PositiveFloat | Literal["auto"],
        variant: Literal["scc", "affinity", "reciprocal"],
        cut: Literal["exact", "nearest"],
    ) -> None:
        super().__init__(
            backbone=backbone.requires_grad_(False),
            num_clusters=1,  # until the E-step finds more
            optimizer=partial(torch.optim.SGD, lr=0.0),
            schedule=Constant(),
            e_step_every_n_epochs=1,
        )
        self.wanted_clusters = num_clusters
        self.k = k
        self.num_rounds = num_rounds
        self.upper = upper
        self.lower = lower
        self.variant = variant
        self.cut = cut
        # Lightning and DDP run no method without a weight. This one is never used and stays 0.
        self.no_weight = nn.Parameter(torch.zeros(()))
        num_features: int = backbone.num_features  # type: ignore[assignment]
        self.register_buffer("fit_features", torch.zeros(num_images, num_features))  # of unit length
        self.register_buffer("assignments", torch.zeros(num_images, dtype=torch.int64))
        # After each round, numbered by first member; -1 for rounds that were not needed.
        self.register_buffer("partitions", torch.full((num_rounds, num_images), -1, dtype=torch.int32))
        self.register_buffer("thresholds", torch.zeros(num_rounds, dtype=torch.float64))
        self.register_buffer("modularities", torch.zeros(num_rounds + 1, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(()))  # mean cosine distance of neighbours
        # Positions of the images, cluster by cluster; they follow from `assignments`, and programs cannot sort.
        self.register_buffer("members", torch.arange(num_images), persistent=False)
        self.read_assignments()

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        self.leave_untrained([self.no_weight])
        return {"nothing": 0 * self.no_weight}

    # The tree

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        if not self.has_earlier_run and any(True for _ in self.backbone.parameters()):
            log.warning("start is null: the features are those of the backbone as it was built")
        graph = build_cosine_graph(features, self.k)
        self.fit_features.copy_(normalize(features, dim=1))
        if distributed.rank() == 0:
            self.cluster(graph)
        for buffer in (self.assignments, self.partitions, self.thresholds, self.modularities, self.scale):
            distributed.broadcast(buffer, 0)
        self.read_assignments()

    def cluster(self, graph: NeighborGraph) -> None:
        """Build the tree of a graph of the fit set and cut it."""
        partitions, thresholds = self.agglomerate(graph)
        modularities = compute_modularities(partitions, graph)
        if isinstance(self.wanted_clusters, str):  # auto
            assignments = partition_at(partitions, best_level(modularities))
        elif self.cut == "nearest":
            assignments = nearest_cut(partitions, self.wanted_clusters)
        else:
            assignments = exact_cut(partitions, self.wanted_clusters, graph, self.fit_features.cpu().numpy())
        self.assignments.copy_(torch.from_numpy(assignments))
        self.partitions.fill_(-1)
        found = (partitions, self.partitions), (thresholds, self.thresholds), (modularities, self.modularities)
        for values, buffer in found:
            buffer[: len(values)] = torch.from_numpy(values)
        if len(graph.weights):
            self.scale.copy_((1 - graph.weights.mean()).clamp(min=SMALLEST_SCALE))

    def agglomerate(self, graph: NeighborGraph) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Return the partitions (R, M) of the fit set after each round, and the thresholds (R,) of the rounds."""
        thresholds = self.choose_thresholds(graph)
        partitions = agglomerate(graph, thresholds, only_mutual=self.variant == "reciprocal")
        return partitions, thresholds[: len(partitions)]

    def choose_thresholds(self, graph: NeighborGraph) -> NDArray[np.float64]:
        """Return the threshold of each round; `graph` decides on those that are left to it.

        Raises:
            InputError: if they do not fall.
        """
        if self.variant != "scc":
            return np.full(self.num_rounds, -np.inf)
        highest, lowest = choose_threshold_range(graph) if "auto" in (self.upper, self.lower) else (1.0, 1.0)
        upper = highest if isinstance(self.upper, str) else self.upper
        lower = lowest if isinstance(self.lower, str) else self.lower
        if lower > upper:
            raise InputError(
                f"the thresholds begin with {upper:.3g} (method.upper) and end with {lower:.3g} (method.lower)",
                expected="falling thresholds",
                do="set method.upper=auto method.lower=auto",
            )
        return np.geomspace(upper, lower, self.num_rounds)

    def read_assignments(self) -> None:
        """Take over the number of clusters, their sizes and their members from the state."""
        self.cluster_sizes: list[int] = self.assignments.bincount().tolist()
        self.num_clusters = len(self.cluster_sizes)
        self.members.copy_(self.assignments.argsort(stable=True))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self.read_assignments()
        return result

    def cluster_tree(self) -> ClusterTree:
        num_rounds = int((self.partitions[:, 0] >= 0).sum())
        return ClusterTree(
            partitions=self.partitions[:num_rounds].cpu().numpy(),
            thresholds=self.thresholds[:num_rounds].cpu().numpy(),
            modularities=self.modularities[: num_rounds + 1].cpu().numpy(),
            assignments=self.assignments.cpu().numpy(),
        )

    def e_step_assignments(self) -> Tensor:
        return self.assignments

    # New images

    @full_precision
    def cluster_logits(self, features: Tensor) -> Tensor:
        """Return minus the cosine distances (N, K) of features (N, D) to the nearest image of the fit set in a cluster.

        They are divided by the mean distance of neighbours in the fit set.
        """
        rows = normalize(features, dim=1).to(self.fit_features)
        clusters = self.fit_features[self.members].split(self.cluster_sizes)
        size = max(PRODUCTS_AT_A_TIME // len(self.fit_features), 1)
        # A program that is exported takes any number of rows at a time.
        parts = [rows] if torch.compiler.is_exporting() or torch.jit.is_tracing() else rows.split(size)
        distances = [torch.stack([nearest_distances(part, cluster) for cluster in clusters], 1) for part in parts]
        return -torch.cat(distances) / self.scale


def nearest_distances(rows: Tensor, others: Tensor) -> Tensor:
    """Return the cosine distances (N,) of unit rows (N, D) to the nearest of `others` (M, D), 0 to the same row."""
    nearest = others[(rows @ others.T).argmax(1)]
    return (rows - nearest).square().sum(1) / 2  # 1 - cosine, without its rounding error
