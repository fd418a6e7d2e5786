"""TCC, a reconstruction: twin-contrast clustering (Shen, Shen, Wang, Qin, Torr, Shao; NeurIPS 2021, arXiv 2106.01908).

The assignment of an image to one of K clusters is a random variable that links two contrasts ("You Never Cluster
Alone"). In the contrast of images, a sample of the assignment is added to the embedding of an image, which is then
told apart from images of earlier batches. Its objective is a bound on a likelihood in which the assignment is latent.
So the divergence of the assignment from the uniform distribution is part of it, and the gradient passes through a
relaxed sample (Gumbel softmax). In the contrast of clusters, each cluster is the mean of the embeddings of a batch,
weighted by their assignments; it is to be found again in another view of the batch, among clusters of earlier batches.
The cluster of an image is the arg max of its assignment, without noise. There are no stages and no state per image.

Differs from the authors' code in: no code was published, and of the paper only the first page, the captions and the
results were at hand when this was written. Scores of this method are those of a reconstruction of TCC, not of TCC.
- From the paper's first page: all of the above but the form of each formula.
- Changed: by default the divergence is that of the mean assignment (`prior: mean`), so that the objective is no longer
  the paper's bound on a likelihood, and a cluster's vector is not of unit length, as it is recalled to be. The reasons
  stand below.
- Recalled from the paper, and uncertain: the formulas of both terms, that the sample enters the query through one
  linear layer and is added to the embedding (`context: concat` is the other possibility), and the temperatures, weights
  and sizes of queues, which conf/method/tcc.yaml marks.
- Own choices: a temperature in the assignment, and the same one in the contrast of clusters, as below; keys come from a
  moving average of the networks, the projector has two layers, only clusters of other indices are negatives of a
  cluster, both terms are computed in both directions (`symmetric: false`: in one), and the views, optimiser and batch
  size are CC's or those of its relatives.
- Several processes. Keys of all processes enter the queue, and clusters are means over the global batch.

What is recalled of the paper (`cluster_vector: unit`, `prior: each`, `assignment_temperature: 1`, `cluster_temperature:
1`) makes an objective that is met without any clusters. A vector R_k of unit length does not tell how certain the
assignments are. While all of them are near 1/K, R_k depends linearly on the prototype, R_k ~ mean v + Cov(v) (mu_k -
mean mu), whatever groups the embeddings form; any ten prototypes that point apart in the widest directions of v then
bring the contrast of clusters near its least value, and its gradient vanishes. The contrast of images gains nothing
from the assignment, because the query holds v already, so the prior keeps it undecided. The arg max cuts the sphere of
v into sectors of arbitrary directions. A weighted mean is the longer, the narrower its cluster, so that the contrast
rewards clusters. The prior on the mean of the assignments leaves each of them free to be certain and keeps clusters
equally large. docs/results.md has the figures.

Logged terms, all of them weighted:
- `train/instance`: the contrast of images.
- `train/prior`: log K minus the entropy of the mean assignment: 0 if clusters are equally large, log K if there is one.
  With `prior: each`, log K minus the mean entropy: 0 if none is decided, log K if all are certain.
- `train/cluster`: the contrast of clusters.
The first and the last are 0 in the first step, in which the queues are empty.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.losses.balance import cluster_size_entropy_deficit
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.ema import TargetNetwork, make_target, update_target
from deepclust.nn.queue import Queue
from deepclust.nn.schedules import Schedule
from deepclust.number_types import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt


class TCC(ClusteringMethod):
    """TCC, as reconstructed. State between steps: the target networks and the two queues.

    The arguments not listed here are those of `ClusteringMethod`. Letters are those of the paper, as recalled.

    Args of the networks:
        embedding_size: the size D of the embeddings v.
        context: how the sample g of the assignment enters the query: `add`, unit(v + W g + b), or `concat`,
            unit(W [v, g] + b).
        ema_decay: the EMA decay of the target networks, which make the keys; with 0 they are the online networks.

    Args of the objective:
        symmetric: whether each view is the query once and the key once; otherwise the first view is the query.
        assignment_temperature: divides the similarity of an embedding and a prototype in the assignment.
        gumbel_temperature: lambda, the temperature of the relaxed sample of the assignment.
        instance_temperature: kappa, the temperature of the contrast of images.
        cluster_temperature: tau, the temperature of the contrast of clusters.
        prior: what is held against the uniform distribution: `each` assignment, or the `mean` of those of a batch.
        prior_weight: the weight of its divergence from the uniform distribution; 1 in the bound, which has `each`.
        cluster_vector: what a cluster is in its contrast: the weighted `mean` of the embeddings, or `unit`, the same
            scaled to unit length.
        cluster_weight: alpha, the weight of the contrast of clusters.
        key_queue_size: J, the number of keys of earlier batches that are negatives of an image.
        cluster_queue_size: L, the number of clusters of earlier batches that are remembered as negatives.
    """

    num_views = 2

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: PositiveInt,
        embedding_size: PositiveInt,
        context: Literal["add", "concat"],
        ema_decay: Fraction,
        symmetric: bool,
        assignment_temperature: PositiveFloat,
        gumbel_temperature: PositiveFloat,
        instance_temperature: PositiveFloat,
        cluster_temperature: PositiveFloat,
        prior: Literal["each", "mean"],
        prior_weight: NonNegativeFloat,
        cluster_vector: Literal["mean", "unit"],
        cluster_weight: NonNegativeFloat,
        key_queue_size: PositiveInt,
        cluster_queue_size: PositiveInt,
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
        width: int = backbone.num_features  # type: ignore[assignment]
        self.projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, embedding_size))
        self.cluster_head = nn.Linear(embedding_size, num_clusters, bias=False)  # its rows are the prototypes mu_k
        context_features = num_clusters if context == "add" else embedding_size + num_clusters
        self.context_layer = nn.Linear(context_features, embedding_size)
        self.target = TargetNetwork(self.backbone, self.projector)
        self.target_cluster_head = make_target(self.cluster_head)
        self.key_queue = Queue(size=key_queue_size, num_features=embedding_size)
        self.cluster_queue = Queue(size=cluster_queue_size, num_features=embedding_size)
        self.context = context
        self.ema_decay = ema_decay
        self.symmetric = symmetric
        self.assignment_temperature = assignment_temperature
        self.gumbel_temperature = gumbel_temperature
        self.instance_temperature = instance_temperature
        self.cluster_temperature = cluster_temperature
        self.prior = prior
        self.prior_weight = prior_weight
        self.cluster_vector = cluster_vector
        self.cluster_weight = cluster_weight

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Return the weighted terms; also moves the target networks before, and fills the queues after."""
        batch.refuse_extra_images("and TCC assigns every image that it learns from to a cluster")
        if self.is_optimizer_step:
            self.update_target(self.ema_decay)
        a, b = batch.views
        query_views, key_views, names = ([a, b], [b, a], "ab") if self.symmetric else ([a], [b], "a")
        # Each view goes through the networks by itself, so that batch normalisation sees one view at a time.
        v = torch.stack([self.encode(view) for view in query_views])
        keys = torch.stack([self.target(view) for view in key_views])
        logits = self.cluster_logits(v)
        noise = [batch.draws.gumbel_like(x, f"noise of {name}") for x, name in zip(logits, names, strict=True)]
        instance, prior, cluster = self.compute_terms_and_fill_queues(
            v, logits, torch.stack(noise), keys, batch.indices
        )
        return {
            "instance": instance,
            "prior": self.prior_weight * prior,
            "cluster": self.cluster_weight * cluster,
        }

    def update_target(self, decay: float) -> None:
        """Do target <- decay * target + (1 - decay) * online for all target networks."""
        self.target.update(self.backbone, self.projector, decay=decay)
        update_target(self.target_cluster_head, self.cluster_head, decay)

    @replayable()
    @full_precision
    def compute_terms_and_fill_queues(
        self, v: Tensor, logits: Tensor, noise: Tensor, keys: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three unweighted terms, means over V directions; then put keys and their clusters into the queues.

        Embeddings v and keys are (V, N, D), the logits of v and their Gumbel noise (V, N, K). In a direction, v is of
        one view of the images `indices` (N,), and the keys are of the other.
        """
        queries = self.make_queries(v, relaxed_sample(logits, noise, temperature=self.gumbel_temperature))
        # Copies, because the queues change before the backward pass.
        key_rows, cluster_rows = self.key_queue.rows.clone(), self.cluster_queue.rows.clone()
        is_filled = self.key_queue.indices >= 0
        instance = contrast_with_queue(queries, keys, key_rows, is_filled, temperature=self.instance_temperature)
        mean_factor = distributed.global_mean_factor(indices)
        if self.prior == "each":
            prior = mean_factor * divergence_from_uniform(logits)
        else:
            prior = divergence_of_mean_from_uniform(logits)
        make_vectors = average_by_cluster if self.cluster_vector == "mean" else sum_by_cluster
        clusters = make_vectors(v, logits)
        key_clusters = make_vectors(keys, self.target_cluster_head(keys) / self.assignment_temperature)
        cluster = cluster_contrast(
            clusters, key_clusters, cluster_rows, self.cluster_queue.indices, temperature=self.cluster_temperature
        )
        num_directions = len(v)
        global_keys = distributed.all_gather_views(keys.flatten(0, 1), num_directions)
        self.key_queue.push(global_keys, distributed.all_gather(indices).repeat(num_directions))
        cluster_ids = torch.arange(self.num_clusters, device=v.device)
        self.cluster_queue.push(key_clusters.flatten(0, 1), cluster_ids.repeat(num_directions))
        return mean_factor * instance, prior, cluster

    def make_queries(self, v: Tensor, sample: Tensor) -> Tensor:
        """Return unit queries e (..., N, D) of embeddings v (..., N, D) and samples of assignments (..., N, K)."""
        if self.context == "add":
            return to_unit_length(v + self.context_layer(sample))
        return to_unit_length(self.context_layer(torch.cat([v, sample], -1)))

    # The start and the final clustering

    def start_from(self, earlier: ClusteringMethod) -> None:
        super().start_from(earlier)
        self.update_target(0.0)

    def encode(self, images: Tensor) -> Tensor:
        return to_unit_length(self.projector(self.backbone(images)))

    @full_precision
    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.cluster_head(features) / self.assignment_temperature


@full_precision
def to_unit_length(rows: Tensor) -> Tensor:
    """Return rows (..., D) over their lengths; lengths under 1e-8 are taken as 1e-8."""
    return F.normalize(rows, dim=-1, eps=1e-8)


@full_precision
def relaxed_sample(logits: Tensor, noise: Tensor, *, temperature: float) -> Tensor:
    """Return samples g (..., K), on the simplex, of assignments with these logits (..., K) and standard Gumbel noise.

    g = softmax((logits + noise) / lambda), the Gumbel softmax (arXiv 1611.01144, equation 2).
    """
    return ((logits + noise) / temperature).softmax(-1)


@full_precision
def divergence_from_uniform(logits: Tensor) -> Tensor:
    """Return the mean divergence, a scalar, of the assignments with these logits (..., K) from the uniform one.

    KL(pi || 1 / K) = log K - H(pi), with 0 log 0 = 0.
    """
    log_probabilities = logits.log_softmax(-1)
    return math.log(logits.shape[-1]) + (log_probabilities.exp() * log_probabilities).sum(-1).mean()


@full_precision
def divergence_of_mean_from_uniform(logits: Tensor) -> Tensor:
    """Return the divergence, a scalar, of the mean assignment of the global batch from the uniform one.

    The logits are (V, N, K), and the result is the mean over the V directions.
    """
    sizes = distributed.sum_with_gradient(logits.softmax(-1).sum(-2))
    return torch.stack([cluster_size_entropy_deficit(row.unsqueeze(0)) for row in sizes]).mean()


@full_precision
def contrast_with_queue(
    anchors: Tensor, positives: Tensor, queue: Tensor, is_negative: Tensor, *, temperature: float
) -> Tensor:
    """Return InfoNCE of `anchors` with one positive each, both (..., N, D), among rows of a queue; a scalar.

    -log( exp(a . p / t) / (exp(a . p / t) + sum over negatives q of exp(a . q / t)) ), the mean over all anchors. The
    negatives are those rows of `queue` (L, D) for which `is_negative`, (L,) or (N, L), holds; without any it is 0.
    """
    positive = (anchors * positives).sum(-1, keepdim=True) / temperature
    negative = (anchors @ queue.T / temperature).masked_fill(~is_negative, -torch.inf)
    return (torch.cat([positive, negative], -1).logsumexp(-1) - positive.squeeze(-1)).mean()


@full_precision
def sum_by_cluster(embeddings: Tensor, logits: Tensor) -> Tensor:
    """Return a unit vector for each cluster, R (..., K, D): the weighted sum of the embeddings of the global batch.

    R_k = unit(sum_i pi_i(k) v_i), of embeddings v (..., N, D) and the logits (..., N, K) of their assignments pi. A
    cluster without any mass has the vector 0.
    """
    return to_unit_length(distributed.sum_with_gradient(logits.softmax(-1).mT @ embeddings))


@full_precision
def average_by_cluster(embeddings: Tensor, logits: Tensor) -> Tensor:
    """Return the weighted mean of the embeddings of the global batch for each cluster, R (..., K, D).

    R_k = sum_i pi_i(k) v_i / sum_i pi_i(k), with the letters of `sum_by_cluster`; 0 for a cluster without any mass.
    """
    assignments = logits.softmax(-1)
    sums = distributed.sum_with_gradient(assignments.mT @ embeddings)
    sizes = distributed.sum_with_gradient(assignments.sum(-2)).unsqueeze(-1)
    return sums / sizes.clamp(min=1e-8)


def cluster_contrast(
    clusters: Tensor, key_clusters: Tensor, queue: Tensor, queue_clusters: Tensor, *, temperature: float
) -> Tensor:
    """Return the contrast of clusters, a scalar, from their vectors (..., K, D) in both views.

    `queue` (L, D) are vectors of earlier batches, of the clusters `queue_clusters` (L,), which are -1 for empty slots.
    Those of the same cluster are no negatives.
    """
    cluster_ids = torch.arange(clusters.shape[-2], device=clusters.device).unsqueeze(1)
    is_negative = (queue_clusters >= 0) & (queue_clusters != cluster_ids)
    return contrast_with_queue(clusters, key_clusters, queue, is_negative, temperature=temperature)
