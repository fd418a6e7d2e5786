"""StatDEC, reconstructed from its abstract alone: clusters of very different sizes, by the statistics of each cluster.

Rezaei, Dorigatti, Ruegamer and Bischl, "Learning Statistical Representation with Joint Deep Embedded Clustering",
arXiv 2109.05232v1 (2021); v2 is "Joint Debiased Representation Learning and Imbalanced Data Clustering" (ICDM Workshops
2022). No code was published, and neither text was at hand. This method is inspired by the abstract: scores of it say
nothing about the authors' method.

From the abstract: losses that pull images to centres serve small clusters badly. Therefore two networks are trained at
the same time, one that represents the distribution of the data and one that embeds and clusters, and both use a block
that pools a set into its mean, its variance and its size.

All else is our reconstruction. An auto-encoder learns to reconstruct (`method=autoencoder`). k-means on its embeddings
gives K clusters, and each has a size n, a mean m and a variance v of each of its d numbers. The logarithm of the soft
assignment q of an embedding z to a cluster is, up to a constant,

    eta log(n / N) - 1/2 sum log v - a log(1 + 1/d sum (z - m)^2 / v),

so that clusters are as wide and as large as they are found to be. With a = d this is the density of Student's
t-distribution with d degrees of freedom, and with a size exponent eta of 1 the posterior of a mixture of these. With
a = 1 the widths would outweigh the distances: of ten well separated Gaussians, the means of all clusters meet within a
few poolings. Assignments are trained towards DEC's target p, which takes no notice of the sizes.
The statistics follow the embeddings as an average over batches, and are pooled anew from all images, as the target is,
before each epoch. A statistics network turns those of a cluster, [m; log v; log(n / N)], into its context. The decoder
is given each embedding plus the mean of the contexts by q. The contexts of the two halves of a batch are to agree.

Training takes the images as they are, as DEC does. On images that are rotated and shifted (`view_names=[moved]
before.view_names=[moved]`) there is no end to it: the divergence rises for as long as training goes on, and the
clusters fall apart. A moved image lies in another cluster than its original one time in five, and its gradient
pushes the images near it away from the cluster where it lies. In DEC, images whose target that cluster is hold it where
it is. Here the statistics follow the images that are pushed away, and are constants in the gradient, so nothing holds
them. With statistics that stay those of k-means the clusters last; neither pooling them in the E-step only, nor widths
of a constant mean, nor a tenth of the weight is enough. On images as they are, the divergence falls to almost 0.

Decisions, where the abstract leaves everything open:
- The decoder reads contexts of the running statistics, which are constants in the gradient; those of the two halves of
  a batch have a gradient. The assignments by which anything is pooled are constants.
- The last layer of the statistics network begins at 0, so that the decoder begins as that of the auto-encoder.
- A cluster without any mass has the logit of the lowest number, so that it takes no part.
- Several processes: the statistics are those of the whole batch; a run equals that of one process.

Logged:
- `train/clustering`: the weighted divergence KL(p || q).
- `train/reconstruction`: the weighted mean over all pixels of the squared difference.
- `train/consistency`: the weighted mean over the clusters of the squared distance of the contexts of the two halves.
- `statistics/smallest_cluster`, `statistics/largest_cluster`: the smallest and the largest n / N.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.cluster_statistics import ClusterStatistics, average_statistics, pool_statistics
from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from deepclust.clustering.student_assignments import target_distribution, target_divergence
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.losses.reconstruction import reconstruction_loss
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.decoder import find_decoder
from deepclust.nn.one_hot import one_hot_mask
from deepclust.nn.schedules import Schedule
from deepclust.number_types import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

SMALLEST_SHARE = 1e-6  # of all images, as the statistics network sees a cluster: the logarithm of 0 is not finite


class StatDEC(ClusteringMethod):
    """The reconstruction of StatDEC, on the auto-encoder of an earlier run.

    The arguments not listed here are those of `ClusteringMethod`. The E-step runs before each epoch: it pools the
    statistics of all images and renews the target.

    Args of the networks:
        backbone: the encoder, from images to embeddings (N, D).
        decoder: from embeddings (N, D) to images. It is used and trained only with a `reconstruction_weight`.
        hidden_size: width of the hidden layer of the statistics network.
        num_images: number M of images that are clustered; each has a target.

    Args of the statistics:
        size_exponent: how far the assignments follow the sizes of the clusters (eta); 0: not at all.
        distance_exponent: how steeply they fall with the distance (a); the number of features d makes them a density.
        variance_floor: is added to all variances.
        statistics_decay: what the running statistics keep of themselves in each step.

    Args of the objective:
        clustering_weight: weight of the divergence of the assignments from their target.
        reconstruction_weight: weight of the reconstruction loss.
        consistency_weight: weight of the distance of the contexts of the two halves of a batch.

    Args of the k-means that finds the first clusters:
        kmeans_restarts: number of restarts, of which the best result is kept.
        kmeans_max_iterations: largest number of iterations of a restart.
        kmeans_tolerance: tolerance of the convergence test of a restart.
    """

    num_views = 1
    targets: Tensor
    sizes: Tensor
    means: Tensor
    variances: Tensor
    has_statistics: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        decoder: nn.Module,
        hidden_size: PositiveInt,
        num_images: PositiveInt,
        num_clusters: PositiveInt,
        size_exponent: NonNegativeFloat,
        distance_exponent: PositiveFloat,
        variance_floor: PositiveFloat,
        statistics_decay: Fraction,
        clustering_weight: NonNegativeFloat,
        reconstruction_weight: NonNegativeFloat,
        consistency_weight: NonNegativeFloat,
        kmeans_restarts: PositiveInt,
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
            e_step_every_n_epochs=1,
        )
        num_features: int = backbone.num_features  # type: ignore[assignment]
        self.decoder = decoder if reconstruction_weight else None
        self.statistics_network = make_statistics_network(num_features, hidden_size)
        self.num_images = num_images
        self.size_exponent = size_exponent
        self.distance_exponent = distance_exponent
        self.variance_floor = variance_floor
        self.statistics_decay = statistics_decay
        self.clustering_weight = clustering_weight
        self.reconstruction_weight = reconstruction_weight
        self.consistency_weight = consistency_weight
        self.kmeans_restarts = kmeans_restarts
        self.kmeans_max_iterations = kmeans_max_iterations
        self.kmeans_tolerance = kmeans_tolerance
        self.register_buffer("targets", torch.zeros(num_images, num_clusters))  # of the last E-step
        self.register_buffer("sizes", torch.zeros(num_clusters))  # as the next two, the running statistics
        self.register_buffer("means", torch.zeros(num_clusters, num_features))
        self.register_buffer("variances", torch.full((num_clusters, num_features), variance_floor))
        self.register_buffer("has_statistics", torch.zeros((), dtype=torch.bool))

    def start_from(self, earlier: ClusteringMethod) -> None:
        super().start_from(earlier)
        if self.decoder is not None:
            self.load_weights(self.decoder, find_decoder(earlier, autoencoder="autoencoder"))

    # Statistics and target of all images

    def on_train_start(self) -> None:
        if not self.has_statistics:
            self.require_earlier_run("StatDEC clusters the embeddings", stage="autoencoder")

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Pool the statistics of all images, the first time by k-means, and renew their target."""
        features = features.to(self.weight_dtype)
        if self.has_statistics:
            assignments = self.compute_logits(features).softmax(1)
        else:
            assignments = one_hot_mask(self.find_clusters(features, key), self.num_clusters).to(features.dtype)
        self.keep_statistics(pool_statistics(features, assignments, variance_floor=self.variance_floor))
        self.has_statistics.fill_(True)
        self.targets.copy_(target_distribution(self.compute_logits(features).softmax(1)))

    def find_clusters(self, features: Tensor, key: tuple[int | str, ...]) -> Tensor:
        """Return the first assignments (M,) of the embeddings (M, D), by k-means."""
        result = kmeans_on_all_ranks(
            features,
            num_clusters=self.num_clusters,
            metric="euclidean",
            num_restarts=self.kmeans_restarts,
            max_iterations=self.kmeans_max_iterations,
            tolerance=self.kmeans_tolerance,
            key=key,
        )
        return result.assignments

    def copy_statistics(self) -> ClusterStatistics:
        """Return a copy of the running statistics, which change before the gradient of a step is computed."""
        return ClusterStatistics(self.sizes.clone(), self.means.clone(), self.variances.clone())

    def keep_statistics(self, statistics: ClusterStatistics) -> None:
        """Make these the running statistics; the sizes are those among all images."""
        for buffer, value in zip((self.sizes, self.means, self.variances), statistics, strict=True):
            buffer.copy_(value)

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        batch.refuse_extra_images("and StatDEC has targets only for the images that are clustered")
        images = batch.views[0]
        embeddings = self.backbone(images)
        # Before the running statistics move on.
        reconstructions = None if self.decoder is None else self.reconstruct(self.decoder, embeddings)
        terms = self.compute_cluster_terms(
            distributed.all_gather_with_gradient(embeddings), distributed.all_gather(self.targets[batch.indices])
        )
        if reconstructions is not None:
            weight = self.reconstruction_weight * distributed.global_mean_factor(images)
            terms["reconstruction"] = weight * reconstruction_loss(reconstructions, images)
        return terms

    def reconstruct(self, decoder: nn.Module, embeddings: Tensor) -> Tensor:
        """Return what the decoder makes of embeddings (N, D), each with the mean of the contexts by its assignments."""
        contexts = self.statistics_network(describe_statistics(self.copy_statistics(), self.num_images))
        return decoder(embeddings + self.compute_logits(embeddings).softmax(1) @ contexts)

    @replayable()
    def compute_cluster_terms(self, embeddings: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the clusters from embeddings (N, D) and targets (N, K) of a whole batch.

        Then the running statistics move towards those of the batch.
        """
        logits = self.compute_logits(embeddings)
        q = logits.detach().softmax(1)
        half = len(embeddings) // 2
        contexts = [self.compute_batch_contexts(embeddings[rows], q[rows]) for rows in (slice(half), slice(half, None))]
        with torch.no_grad():
            pooled = pool_statistics(embeddings, q, variance_floor=self.variance_floor)
            pooled = pooled._replace(sizes=pooled.sizes * (self.num_images / len(embeddings)))
            self.keep_statistics(average_statistics(self.copy_statistics(), pooled, decay=self.statistics_decay))
        return {
            "clustering": self.clustering_weight * target_divergence(targets, logits),
            "consistency": self.consistency_weight * consistency_loss(*contexts),
        }

    def compute_batch_contexts(self, embeddings: Tensor, assignments: Tensor) -> Tensor:
        """Return the contexts (K, D) of the clusters as embeddings (N, D) with assignments (N, K) show them."""
        statistics = pool_statistics(embeddings, assignments, variance_floor=self.variance_floor)
        return self.statistics_network(describe_statistics(statistics, len(embeddings)))

    def compute_logits(self, embeddings: Tensor) -> Tensor:
        """Return the logits (N, K) of the soft assignments of embeddings (N, D) by the running statistics."""
        return size_aware_logits(
            embeddings,
            self.copy_statistics(),
            size_exponent=self.size_exponent,
            distance_exponent=self.distance_exponent,
            num_images=self.num_images,
        )

    def log_terms(self, terms: dict[str, Tensor], loss: Tensor) -> None:
        super().log_terms(terms, loss)
        shares = self.sizes / self.num_images
        self.log_dict({"statistics/smallest_cluster": shares.min(), "statistics/largest_cluster": shares.max()})

    def e_step_assignments(self) -> Tensor:
        return self.targets.argmax(1)

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        return self.compute_logits(features) if self.has_statistics else None


def make_statistics_network(num_features: int, hidden_size: int) -> nn.Sequential:
    """Return the network from what `describe_statistics` says of a cluster to its context of `num_features` numbers."""
    last = nn.Linear(hidden_size, num_features)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(2 * num_features + 1, hidden_size), nn.ReLU(inplace=True), last)


def describe_statistics(statistics: ClusterStatistics, num_images: int) -> Tensor:
    """Return [m; log v; log(n / N)] of each of K clusters of N images, `num_images`, as rows (K, 2 D + 1)."""
    shares = (statistics.sizes / max(num_images, 1)).clamp(min=SMALLEST_SHARE)
    return torch.cat([statistics.means, statistics.variances.log(), shares.log().unsqueeze(1)], 1)


@full_precision
def size_aware_logits(
    embeddings: Tensor,
    statistics: ClusterStatistics,
    *,
    size_exponent: float,
    distance_exponent: float,
    num_images: float,
) -> Tensor:
    """Return the logits (N, K) of the soft assignments of embeddings (N, D) to clusters with these statistics.

    They are eta log(n / N) - 1/2 sum log v - a log(1 + 1/d sum (z - m)^2 / v), where eta is `size_exponent`, a is
    `distance_exponent` and N is `num_images`; the lowest number where the size n is 0. The gradient reaches the
    embeddings only.
    """
    sizes, means, variances = (values.detach() for values in statistics)
    priors = size_exponent * (sizes / num_images).log() - variances.log().sum(1) / 2
    # One cluster at a time: differences from all means at once would take K times the memory of the embeddings.
    distances = [((embeddings - m).square() / v).mean(1) for m, v in zip(means, variances, strict=True)]
    logits = priors - distance_exponent * torch.log1p(torch.stack(distances, 1))
    return logits.masked_fill(sizes == 0, torch.finfo(logits.dtype).min)


@full_precision
def consistency_loss(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean over the clusters of the squared distance of two contexts (K, D) of each, a scalar."""
    return (first - second).square().sum(1).mean()
