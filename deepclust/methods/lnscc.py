"""LNSCC: locally normalized soft contrastive clustering (Ma and Kim, IJCAI 2022, doi 10.24963/ijcai.2022/460).

A graph of nearest neighbours is built once, from the pixels or vectors themselves. Its weights are normalised for each
image, so that images at the border of a cluster count as much as those in its dense core. A network embeds the images
in three phases. In the first, pairs of the graph (positive pairs), drawn in proportion to their weights, attract each
other, and random pairs (negative pairs) repel each other. The second begins when k-means sets cluster centres in the
embedding; they do not move yet. In the third, embedding and centres are trained together on sharpened Student-t
assignments. The method needs no augmentation, convolution or pre-training, and works on vectors that are no images.
The final clustering is the nearest centre, also for new images.

This follows the code that the first author released, because the text of the paper was not available. Symbols below
are those of that code.

Differs from the authors' code in:
- Positive pairs. They are drawn with replacement, in proportion to how often the code's list of pairs contains them:
  first an image by its share of the list, then its partner. No list of millions of pairs is made. An epoch has as many
  pairs as there are images.
- Neighbours. They are exact (theirs: approximate).
- Dropout. There is none. The authors' training loop leaves training mode after the first step, so that their results
  are without dropout too.
- Several processes. Negative pairs, cluster sizes and shares are those of the global batch (theirs: one device).

Logged:
- `train/pair`: the mean loss of positive and negative pairs.
- `train/cluster`: the weighted KL divergence of the assignments from their sharpened form. 0 before the third phase.
- `train/balance`: the weighted squared distance of cluster shares from the requested ones. 0 before the third phase.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from scipy.optimize import curve_fit
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.kmeans_distances import squared_distances
from deepclust.clustering.neighbor_graph import (
    PartnerSampler,
    build_neighbor_graph_on_all_ranks,
    compute_multiplicities,
)
from deepclust.clustering.student_assignments import target_distribution
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule
from deepclust.number_types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

log = logging.getLogger(__name__)


class LNSCC(ClusteringMethod):
    """LNSCC, whose `backbone` ends in the embedding that is clustered.

    The arguments not listed here are those of `ClusteringMethod`.

    Args of the neighbour graph:
        num_neighbors: number k of neighbours of an image, itself included.
        max_multiplicity: how often the pair with weight 1 is counted when pairs are drawn; others in proportion.

    Args of the contrast of pairs (L_pair):
        min_dist: distance in the embedding up to which a pair counts as similar; as in UMAP.
        spread: scale on which the similarity falls beyond `min_dist`; as in UMAP.
        negatives: number M of negative pairs for each positive pair.
        negative_weight: weight gamma of the negative pairs.

    Args of the clustering (L_clu and L_bal):
        cluster_weight: weight lambda_c of the divergence from the sharpened assignments.
        balance_weight: weight lambda_b of the distance from the requested shares.
        cluster_shares: the requested shares pi (K,) of the clusters, in any scale. null: all clusters are equal.
        centres_after_epochs: number of epochs before the centres are set (end of phase 1).
        clustering_after_epochs: number of epochs before the centres are trained (end of phase 2).

    Args of the k-means that sets the centres:
        kmeans_runs: number of k-means runs; the one whose shares are closest to the requested ones is taken.
        kmeans_max_iterations: largest number of iterations of a run.
        kmeans_tolerance: tolerance of the convergence test of a run.
    """

    centres_set: Tensor
    shares: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: PositiveInt,
        num_neighbors: PositiveInt,
        max_multiplicity: PositiveInt,
        min_dist: NonNegativeFloat,
        spread: PositiveFloat,
        negatives: PositiveInt,
        negative_weight: NonNegativeFloat,
        cluster_weight: NonNegativeFloat,
        balance_weight: NonNegativeFloat,
        cluster_shares: Sequence[PositiveFloat] | None,
        centres_after_epochs: NonNegativeInt,
        clustering_after_epochs: NonNegativeInt,
        kmeans_runs: PositiveInt,
        kmeans_max_iterations: PositiveInt,
        kmeans_tolerance: NonNegativeFloat,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
    ) -> None:
        super().__init__(
            backbone=backbone,
            num_clusters=num_clusters,
            optimizer=optimizer,
            schedule=schedule,
            e_step_every_n_epochs=0,
        )
        shares = torch.tensor([1.0] * num_clusters if cluster_shares is None else list(cluster_shares))
        if len(shares) != num_clusters or not bool((shares > 0).all()):
            raise InputError(
                f"method.cluster_shares is {cluster_shares} for {num_clusters} clusters",
                expected="a share above 0 for every cluster, or null",
                do="set method.cluster_shares",
            )
        self.register_buffer("shares", shares / shares.sum(), persistent=False)
        self.centres = nn.Parameter(torch.empty(num_clusters, backbone.num_features))  # type: ignore[call-overload]
        nn.init.xavier_uniform_(self.centres)
        self.register_buffer("centres_set", torch.zeros((), dtype=torch.int64))
        self.a, self.b = fit_similarity_curve(min_dist=min_dist, spread=spread)
        self.num_neighbors = num_neighbors
        self.max_multiplicity = max_multiplicity
        self.negatives = negatives
        self.negative_weight = negative_weight
        self.cluster_weight = cluster_weight
        self.balance_weight = balance_weight
        self.centres_after_epochs = centres_after_epochs
        self.clustering_after_epochs = clustering_after_epochs
        self.kmeans_runs = kmeans_runs
        self.kmeans_max_iterations = kmeans_max_iterations
        self.kmeans_tolerance = kmeans_tolerance
        # It depends on the images only, so a resumed run makes it again.
        self.partner_sampler: PartnerSampler | None = None

    # Pairs of the graph

    def on_train_start(self) -> None:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        images = datamodule.clean_batches(datamodule.fit, self.device)
        rows = distributed.all_gather(torch.cat([batch.flatten(1) for batch in images]))
        if len(rows) < 3:
            raise InputError(
                f"the number of images is {len(rows)}, and LNSCC learns from a graph of nearest neighbours",
                expected="at least 3 images, and many more to find clusters",
                do="add images",
            )
        k = self.num_neighbors
        if k >= len(rows):
            k = len(rows) - 1
            log.warning("method.num_neighbors is %d for %d images; using %d", self.num_neighbors, len(rows), k)
        graph = build_neighbor_graph_on_all_ranks(rows, k)
        self.partner_sampler = PartnerSampler(
            graph, compute_multiplicities(graph.weights, max_multiplicity=self.max_multiplicity)
        )

    def sampling_weights(self) -> Tensor:
        assert self.partner_sampler is not None
        return self.partner_sampler.row_totals.double()

    def companions(self, indices: Tensor, draws: Draws) -> Tensor:
        assert self.partner_sampler is not None
        return self.partner_sampler.draw(indices, draws.make_generator("companions"))[:, None]

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        batch.refuse_extra_images("and LNSCC learns from pairs of the images that it clusters")
        has_clusters = self.current_epoch >= self.clustering_after_epochs
        self.leave_untrained(() if has_clusters else [self.centres])
        z = self.backbone(torch.cat([*batch.views, *batch.companion_views]))  # of images and their graph neighbours
        z_i, z_j = (distributed.all_gather_with_gradient(half) for half in z.chunk(2))
        generator = batch.draws.make_generator("negatives", z.device)
        permutation = torch.randperm(len(z_i) * self.negatives, generator=generator, device=z.device)
        return self.compute_terms(z_i, z_j, permutation)

    @replayable(constants=lambda self: self.current_epoch < self.clustering_after_epochs)
    def compute_terms(self, z_i: Tensor, z_j: Tensor, permutation: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the embeddings z_i and z_j (N, D) of positive pairs.

        `permutation` (N * negatives,) makes the negative pairs.
        """
        positive, negative = pair_losses(
            z_i, z_j, permutation, a=self.a, b=self.b, negative_weight=self.negative_weight
        )
        pair = (positive + negative) / (len(z_i) + len(permutation))
        if self.current_epoch < self.clustering_after_epochs:
            zero = 0 * self.centres.sum()  # DDP expects a gradient of every parameter
            return {"pair": pair, "cluster": zero, "balance": zero}
        q = soft_assignments(torch.cat([z_i, z_j]), self.centres)
        return {
            "pair": pair,
            "cluster": self.cluster_weight * cluster_divergence(q),
            "balance": self.balance_weight * balance_loss(q, self.shares),
        }

    # The centres

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.centres_after_epochs:
            self.run_e_step(self.current_epoch)

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Set the centres to the centroids of the k-means run whose shares are closest to the requested ones."""
        runs = [
            kmeans(
                features,
                num_clusters=self.num_clusters,
                metric="euclidean",
                restarts=[run],
                max_iterations=self.kmeans_max_iterations,
                tolerance=self.kmeans_tolerance,
                key=key,
            )
            for run in range(self.kmeans_runs)
        ]
        sizes = torch.stack([torch.bincount(run.assignments, minlength=self.num_clusters) for run in runs])
        best = int(share_divergence(sizes, self.shares).argmin())
        self.centres.copy_(runs[best].centroids)
        self.centres_set.fill_(1)

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        return -squared_distances(features, self.centres).log1p() if self.centres_set else None


def fit_similarity_curve(*, min_dist: float, spread: float) -> tuple[float, float]:
    """Return a and b of the similarity 1 / (1 + a t^(2b)) at distance t in the embedding, fitted as in UMAP.

    Least squares on 300 distances from 0 to 3 `spread`, against 1 up to `min_dist` and exp(-(t - min_dist) / spread)
    beyond.
    """
    distances = torch.linspace(0, 3 * spread, 300, dtype=torch.float64)
    targets = torch.exp(-(distances - min_dist).clamp(min=0) / spread)
    (a, b), _ = curve_fit(lambda t, a, b: 1 / (1 + a * t ** (2 * b)), distances.numpy(), targets.numpy())
    return float(a), float(b)


@full_precision
def pair_losses(
    z_i: Tensor, z_j: Tensor, permutation: Tensor, *, a: float, b: float, negative_weight: float
) -> tuple[Tensor, Tensor]:
    """Return the summed losses of positive and of negative pairs, two scalars; the second is weighted.

    Positive pairs are the rows of z_i and z_j (N, D). For the negative pairs each of them is repeated M times, and
    `permutation` (N * M,) permutes the second members. With the similarity s = 1 / (1 + a |u - v|^(2b)), a positive
    pair costs log(1 + 1/s) and a negative one log(1 + s).
    """
    num_negatives = len(permutation) // len(z_i)
    heads, tails = z_i.repeat_interleave(num_negatives, 0), z_j.index_select(0, permutation // num_negatives)
    positive, negative = (_dissimilarity(z_i, z_j, a, b), _dissimilarity(heads, tails, a, b))
    return torch.log1p(1 + positive).sum(), negative_weight * torch.log1p(1 / (1 + negative)).sum()


def _dissimilarity(u: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """Return 1/s - 1 = a |u - v|^(2b) for the rows of u and v (N, D)."""
    squared = (u - v).square().sum(1)
    # The slope of the power is infinite at 0. The clamp makes the gradient 0 there.
    return a * squared.clamp(min=torch.finfo(squared.dtype).tiny) ** b


@full_precision
def soft_assignments(z: Tensor, centres: Tensor) -> Tensor:
    """Return the Student-t assignments q (N, K) of embeddings (N, D), proportional to 1 / (1 + squared distance)."""
    similarities = 1 / (1 + squared_distances(z, centres))
    return similarities / similarities.sum(1, keepdim=True)


@full_precision
def cluster_divergence(q: Tensor) -> Tensor:
    """Return the mean of KL(p || q), a scalar, of assignments q (N, K) and their sharpened form p, without gradient."""
    p = target_distribution(q.detach())
    return (torch.xlogy(p, p) - p * torch.log(q + 1e-10)).sum(1).mean()


@full_precision
def balance_loss(q: Tensor, shares: Tensor) -> Tensor:
    """Return the mean squared difference, a scalar, of the mean assignment (q is (N, K)) and the `shares` (K,)."""
    return mse_loss(q.mean(0), shares.to(q.dtype))


def share_divergence(sizes: Tensor, shares: Tensor) -> Tensor:
    """Return KL(shares || actual shares) of R clusterings (R,) with cluster sizes (R, K), in float64.

    `shares` (K,) are the requested ones.
    """
    actual, requested = sizes / sizes.sum(1, keepdim=True, dtype=torch.float64), shares.double()
    return (requested * torch.log((requested + 1e-10) / (actual + 1e-10))).sum(1)
