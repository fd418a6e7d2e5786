"""LNSCC: locally normalized soft contrastive clustering (Ma and Kim, IJCAI 2022, doi 10.24963/ijcai.2022/460).

A graph of nearest neighbours is made once of the images as they are, its weights normalised row by row, so that images
at the border of a cluster count as much as those in its dense core. A network embeds the images: joined pairs are drawn
in proportion to their weights and contract, pairs put together by chance expand. After a while k-means sets cluster
centres in the embedding; later on the embedding and the centres are sharpened together, under Student-t assignments.
No augmentation, no convolution, no pre-training; vectors that are no images will do. The clustering is the nearest
centre, which takes new images too.

The text of the paper was not at hand: this is what the code released by its first author does. Differs from it in:
- training pairs are drawn with replacement in proportion to how often they stand in its list (an image by its share of
  the list, then its partner); no list of millions of pairs is made. An epoch is as many pairs as there are images.
- neighbours are exact; theirs are approximate.
- no dropout: their loop leaves training mode after the first step, so their results are without.
- the gradient of pairs that coincide is 0; theirs is not a number.
- several processes: negatives, cluster sizes and shares belong to the global batch; theirs runs on one device.

Logged: `train/pair`, mean cost of joined and random pairs; `train/cluster`, divergence of the assignments from their
sharpened form, and `train/balance`, how far the mean assignment is from the wanted shares, both weighted and 0 until
they count.
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
from deepclust.clustering.neighbor_graph import Partners, multiplicities, neighbor_graph
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule

log = logging.getLogger(__name__)


class LNSCC(ClusteringMethod):
    """LNSCC: pairs of a neighbour graph from the first epoch, centres after `centres_after_epochs`, and their losses
    after `clustering_after_epochs`; in between the centres stand still.

    `backbone` ends in the embedding. `cluster_shares` (K,) is how large the clusters are meant to be, null: all alike.
    """

    centres_set: Tensor
    shares: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: int,
        num_neighbors: int,
        max_multiplicity: int,
        min_dist: float,
        spread: float,
        negatives: int,
        negative_weight: float,
        cluster_weight: float,
        balance_weight: float,
        cluster_shares: Sequence[float] | None,
        centres_after_epochs: int,
        clustering_after_epochs: int,
        kmeans_runs: int,
        kmeans_max_iterations: int,
        kmeans_tolerance: float,
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
        self.a, self.b = similarity_curve(min_dist=min_dist, spread=spread)
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
        self.partners: Partners | None = None  # hangs on the images alone: made anew where a run is resumed

    # Pairs of the graph

    def on_train_start(self) -> None:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        images = datamodule.clean_batches(datamodule.fit, self.device)
        rows = distributed.gather(torch.cat([batch.flatten(1) for batch in images]))
        if len(rows) < 3:
            raise InputError(
                f"the number of images is {len(rows)}, and LNSCC learns from a graph of nearest neighbours",
                expected="3 images or more, and many more to find clusters",
                do="add images",
            )
        k = self.num_neighbors
        if k >= len(rows):
            k = len(rows) - 1
            log.warning("method.num_neighbors is %d for %d images; %d are taken", self.num_neighbors, len(rows), k)
        graph = neighbor_graph(rows, k)
        self.partners = Partners(graph, multiplicities(graph.weights, most=self.max_multiplicity))

    def sampling_weights(self) -> Tensor:
        assert self.partners is not None
        return self.partners.masses.double()

    def companions(self, indices: Tensor, draws: Draws) -> Tensor:
        assert self.partners is not None
        return self.partners.draw(indices, draws.generator("companions"))[:, None]

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        if batch.extra:
            raise InputError(
                "the data set has extra images, and LNSCC learns from pairs of the images that it clusters",
                expected="a data set without",
                do="set dataset.source.extra=[]",
            )
        z = self.backbone(torch.cat([*batch.views, *batch.companion_views]))
        z_i, z_j = (distributed.gather_with_gradient(half) for half in z.chunk(2))
        draws = batch.draws.generator("negatives", z.device)
        order = torch.randperm(len(z_i) * self.negatives, generator=draws, device=z.device)
        return self.objective(z_i, z_j, order)

    @replayable(by=lambda self: self.current_epoch < self.clustering_after_epochs)
    def objective(self, z_i: Tensor, z_j: Tensor, order: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the embeddings (B, D) of joined pairs, negatives in the `order` (B * negatives,)."""
        joined, random = pair_costs(z_i, z_j, order, a=self.a, b=self.b, negative_weight=self.negative_weight)
        pair = (joined + random) / (len(z_i) + len(order))
        if self.current_epoch < self.clustering_after_epochs:
            still = 0 * self.centres.sum()  # several processes expect every parameter to have a gradient
            return {"pair": pair, "cluster": still, "balance": still}
        q = soft_assignments(torch.cat([z_i, z_j]), self.centres)
        return {
            "pair": pair,
            "cluster": self.cluster_weight * cluster_divergence(q),
            "balance": self.balance_weight * balance_loss(q, self.shares),
        }

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.current_epoch < self.clustering_after_epochs:
            self.centres.grad = None  # Adam is to meet the centres when they begin to move, and not before

    # The centres

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.centres_after_epochs:
            self.run_e_step(self.current_epoch)

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
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
        chosen = int(share_divergence(sizes, self.shares).argmin())
        self.centres.copy_(runs[chosen].centroids)
        self.centres_set.fill_(1)

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        return -squared_distances(features, self.centres).log1p() if self.centres_set else None


def similarity_curve(*, min_dist: float, spread: float) -> tuple[float, float]:
    """The a and b whose 1 / (1 + a t^(2b)) is closest to 1 up to distance `min_dist` and a fall by `spread` beyond.

    Least squares on 300 distances t from 0 to 3 `spread`; the curve and the fit are UMAP's.
    """
    distances = torch.linspace(0, 3 * spread, 300, dtype=torch.float64)
    wanted = torch.exp(-(distances - min_dist).clamp(min=0) / spread)
    (a, b), _ = curve_fit(lambda t, a, b: 1 / (1 + a * t ** (2 * b)), distances.numpy(), wanted.numpy())
    return float(a), float(b)


@full_precision
def pair_costs(
    z_i: Tensor, z_j: Tensor, order: Tensor, *, a: float, b: float, negative_weight: float
) -> tuple[Tensor, Tensor]:
    """Summed costs of the joined pairs, rows of z_i and z_j (B, D), and of random ones, weighted; two scalars.

    For the random ones both are repeated as often as needed, and the second is put in the `order` (B * M,). With the
    similarity s = 1 / (1 + a |u - v|^(2b)) a joined pair costs log(1 + 1/s) and a random one log(1 + s).
    """
    times = len(order) // len(z_i)
    heads, tails = z_i.repeat_interleave(times, 0), z_j.index_select(0, order // times)
    joined, random = (_dissimilarity(z_i, z_j, a, b), _dissimilarity(heads, tails, a, b))
    return torch.log1p(1 + joined).sum(), negative_weight * torch.log1p(1 / (1 + random)).sum()


def _dissimilarity(u: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """1/s - 1 = a |u - v|^(2b) of rows (N, D)."""
    squares = (u - v).square().sum(1)
    # The power has an infinite slope at 0, the clamp none at all.
    return a * squares.clamp(min=torch.finfo(squares.dtype).tiny) ** b


def squared_distances(z: Tensor, centres: Tensor) -> Tensor:
    """Squared Euclidean distances (N, K) of rows (N, D) to centres (K, D)."""
    return torch.cdist(z, centres, compute_mode="donot_use_mm_for_euclid_dist").square()


@full_precision
def soft_assignments(z: Tensor, centres: Tensor) -> Tensor:
    """Student-t assignments q (N, K) of embeddings (N, D): in proportion to 1 / (1 + squared distance)."""
    similarities = 1 / (1 + squared_distances(z, centres))
    return similarities / similarities.sum(1, keepdim=True)


def sharpened(q: Tensor) -> Tensor:
    """The target p (N, K) of assignments q (N, K): in proportion to q^2 over the size of the cluster in the batch."""
    sizes = q.sum(0)
    weights = q.square() / torch.where(sizes > 0, sizes, 1)
    return weights / weights.sum(1, keepdim=True)


@full_precision
def cluster_divergence(q: Tensor) -> Tensor:
    """Mean over the rows of KL(p || q) of assignments q (N, K), p their sharpened form without gradient; a scalar."""
    p = sharpened(q.detach())
    return (torch.xlogy(p, p) - p * torch.log(q + 1e-10)).sum(1).mean()


@full_precision
def balance_loss(q: Tensor, shares: Tensor) -> Tensor:
    """Mean squared difference of the clusters' shares of assignments q (N, K) from the wanted `shares` (K,)."""
    return mse_loss(q.mean(0), shares.to(q.dtype))


def share_divergence(sizes: Tensor, shares: Tensor) -> Tensor:
    """KL(wanted || found) of cluster sizes (R, K) for wanted `shares` (K,), one for each clustering (R,); float64."""
    found, wanted = sizes / sizes.sum(1, keepdim=True, dtype=torch.float64), shares.double()
    return (wanted * torch.log((wanted + 1e-10) / (found + 1e-10))).sum(1)
