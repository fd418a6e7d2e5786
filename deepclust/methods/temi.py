"""TEMI: teacher ensemble-weighted pointwise mutual information (Adaloglou et al.; BMVC 2023, arXiv 2303.17896).

TEMI trains only cluster heads, on the features of a network that is there already. The nearest neighbours of every
image are found once. A pair is an image and one of its neighbours. In the loss, which is a bound of the pointwise
mutual information of the pair, a head gives both the same cluster, more so in clusters that hold few images. Targets
are those of a second set of heads, the moving average of the trained ones. All heads together weight each pair by how
sure their targets are that its two images belong to one cluster, so that false neighbours count for little. The final
clustering is that of the head with the lowest loss, which needs no labels.

Differs from the authors' code in:
- The log domain. The loss is computed from log-probabilities and is finite where their code stops at an infinite one.
- One head. It is allowed (`num_heads` 1).
- The result. It is that of the last epoch. The authors' script reports the checkpoint with the best accuracy on the
  test images.
- Features. Without a network or features that are there, SCAN's first stage makes them; theirs are of large pretrained
  networks.
- Neighbours. An image is never its own neighbour (theirs: from 80,000 images on, nearly always its first). With fewer
  images than `num_neighbors` all others are neighbours.
- Temperatures. They are constant, as in all of the authors' settings.
- Several processes. The shares of the clusters are those of the global batch.

Logged:
- `train/information`: the loss, the mean over pairs and heads. -log K is best: all heads are sure that each pair shares
  a cluster, and all clusters are equal.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.neighbors import draw_one_neighbor, mine_neighbors
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.ema import make_target, update_target
from deepclust.nn.schedules import Schedule
from deepclust.number_types import Fraction, NonNegativeInt, PositiveFloat, PositiveInt

log = logging.getLogger(__name__)
SMALLEST_SHARE = 1e-12  # to which the share of an empty cluster is raised before the loss divides by it


class ClusterHeads(nn.Module):
    """H cluster heads as one: from features (N, D) to logits (H, N, K).

    Each is Linear, GELU, Linear, unit length, and a linear layer without bias whose rows have a trained direction and a
    trained length (`gain`).
    """

    def __init__(
        self, *, num_heads: int, num_features: int, hidden_size: int, bottleneck_size: int, num_clusters: int
    ) -> None:
        super().__init__()
        self.hidden_weight = nn.Parameter(torch.empty(num_heads, hidden_size, num_features).normal_(std=0.02))
        self.hidden_bias = nn.Parameter(torch.zeros(num_heads, hidden_size))
        self.bottleneck_weight = nn.Parameter(torch.empty(num_heads, bottleneck_size, hidden_size).normal_(std=0.02))
        self.bottleneck_bias = nn.Parameter(torch.zeros(num_heads, bottleneck_size))
        self.gain = nn.Parameter(torch.ones(num_heads, num_clusters, 1))
        bound = bottleneck_size**-0.5  # torch's of a linear layer
        direction = torch.empty(num_heads, num_clusters, bottleneck_size).uniform_(-bound, bound)
        self.direction = nn.Parameter(direction)

    def forward(self, features: Tensor, head: Tensor | None = None) -> Tensor:
        """Return the logits (H, N, K) of features (N, D), or (1, N, K) of one head, whose number `head` is (1,)."""
        w1, b1, w2, b2, gain, direction = (
            p if head is None else p.index_select(0, head)
            for p in (
                self.hidden_weight,
                self.hidden_bias,
                self.bottleneck_weight,
                self.bottleneck_bias,
                self.gain,
                self.direction,
            )
        )
        # All heads see the same features, so that the first layer is one product.
        hidden = F.linear(features, w1.flatten(0, 1), b1.flatten()).unflatten(1, b1.shape).transpose(0, 1)
        bottleneck = torch.baddbmm(b2[:, None], F.gelu(hidden), w2.transpose(1, 2))
        last = gain * F.normalize(direction, dim=2)
        return torch.bmm(F.normalize(bottleneck, dim=2), last.transpose(1, 2))

    @property
    def biases(self) -> list[nn.Parameter]:
        return [self.hidden_bias, self.bottleneck_bias]

    @property
    def last_layer(self) -> list[nn.Parameter]:
        return [self.gain, self.direction]


class TEMI(ClusteringMethod):
    """TEMI on the features of `backbone`, which is not trained.

    The arguments not listed here are those of `ClusteringMethod`.

    Args of the heads:
        num_heads: number H of heads; the best one gives the clustering.
        hidden_size: width of the hidden layer of a head.
        bottleneck_size: width of what the last layer of a head sees.
        standardize: whether heads see the features less their mean and over their standard deviation.
        ema_decay: decay of the moving average that the target heads are.
        frozen_epochs: number of first epochs in which the last layers are not trained.

    Args of the pairs:
        num_images: number M of images that are clustered; each has a row in the table of neighbours.
        num_neighbors: number k of neighbours of an image, from which its partner is drawn.

    Args of the objective:
        beta: exponent of the products of probabilities; below 1 it keeps heads from ever fewer clusters.
        temperature: temperature of the softmax of the trained heads.
        target_temperature: temperature of the softmax of the target heads.
        marginal_momentum: share that the running shares of the clusters keep in a step.
    """

    num_views = 1
    neighbors: Tensor
    marginals: Tensor
    head_losses: Tensor
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_images: PositiveInt,
        num_clusters: PositiveInt,
        num_heads: PositiveInt,
        hidden_size: PositiveInt,
        bottleneck_size: PositiveInt,
        standardize: bool,
        ema_decay: Fraction,
        frozen_epochs: NonNegativeInt,
        num_neighbors: PositiveInt,
        beta: PositiveFloat,
        temperature: PositiveFloat,
        target_temperature: PositiveFloat,
        marginal_momentum: Fraction,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
    ) -> None:
        super().__init__(
            backbone=backbone.requires_grad_(False),
            num_clusters=num_clusters,
            optimizer=optimizer,
            schedule=schedule,
            e_step_every_n_epochs=0,
        )
        num_features: int = backbone.num_features  # type: ignore[assignment]
        self.heads = ClusterHeads(
            num_heads=num_heads,
            num_features=num_features,
            hidden_size=hidden_size,
            bottleneck_size=bottleneck_size,
            num_clusters=num_clusters,
        )
        self.target_heads = make_target(self.heads)
        self.num_neighbors = num_neighbors
        self.standardize = standardize
        self.ema_decay = ema_decay
        self.frozen_epochs = frozen_epochs
        self.beta = beta
        self.temperature = temperature
        self.target_temperature = target_temperature
        self.marginal_momentum = marginal_momentum
        # (M, k): the neighbours of each image, nearest first; -1 until they are mined
        self.register_buffer("neighbors", torch.full((num_images, min(num_neighbors, num_images - 1)), -1))
        self.register_buffer("marginals", torch.full((num_heads, num_clusters), 1 / num_clusters))
        self.register_buffer("head_losses", torch.zeros(num_heads))  # sums over the pairs of this epoch so far
        self.register_buffer("feature_mean", torch.zeros(num_features))
        self.register_buffer("feature_std", torch.ones(num_features))
        self.neighbors_on_cpu = self.neighbors
        self.train()

    def train(self, mode: bool = True) -> "TEMI":
        super().train(mode)
        self.backbone.eval()
        return self

    # Neighbours, and the statistics of the features

    def on_train_start(self) -> None:
        num_images, k = self.neighbors.shape
        if k == 0:
            raise InputError(
                f"the number of images is {num_images}, and TEMI learns from images and their nearest neighbours",
                expected="at least 2 images, and many more to find clusters",
                do="add images",
            )
        if bool((self.neighbors < 0).any()):
            if not self.has_earlier_run and any(True for _ in self.backbone.parameters()):
                log.warning("start and before are null: the features are those of the backbone as it was built")
            if k < self.num_neighbors:
                log.warning("method.num_neighbors is %d for %d images; using %d", self.num_neighbors, num_images, k)
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
            features = self.encode_all(datamodule.clean_batches(datamodule.fit, self.device), len(datamodule.fit))
            self.neighbors.copy_(mine_neighbors(features, k)[:, 1:])
            if self.standardize:
                mean, std = feature_statistics(features)
                self.feature_mean.copy_(mean)
                self.feature_std.copy_(std)
        self.neighbors_on_cpu = self.neighbors.cpu()

    def companions(self, indices: Tensor, draws: Draws) -> Tensor:
        """Return one companion (N, 1) of each image: one of its neighbours, with equal chances."""
        return draw_one_neighbor(self.neighbors_on_cpu[indices], draws.make_generator("companions"))

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        batch.refuse_extra_images("and TEMI finds neighbours only among the images that are clustered")
        self.leave_untrained(self.heads.last_layer if self.current_epoch < self.frozen_epochs else ())
        with torch.no_grad():
            features = self.scale_features(self.encode(torch.cat([batch.views[0], batch.companion_views[0]])))
            target_logits = self.target_heads(features)
        return self.compute_terms(self.heads(features), target_logits)

    @replayable()
    @full_precision
    def compute_terms(self, logits: Tensor, target_logits: Tensor) -> dict[str, Tensor]:
        """Return the loss of the logits (H, 2N, K) of all heads for images and then a neighbour of each.

        Renews the running shares of the clusters, and adds to the losses of the heads in this epoch.
        """
        log_q = (logits / self.temperature).log_softmax(2)
        log_t = (target_logits / self.target_temperature).log_softmax(2)
        self.marginals.copy_(renew_marginals(self.marginals, log_t, momentum=self.marginal_momentum))
        pair_losses = temi_losses(log_q, log_t, self.marginals, beta=self.beta)
        # (1, H) for each process, so that their rows are those of all processes
        self.head_losses += distributed.all_gather(pair_losses.detach().sum(1)[None]).sum(0)
        return {"information": distributed.global_mean_factor(pair_losses[0]) * pair_losses.mean()}

    def scale_features(self, features: Tensor) -> Tensor:
        """Return features (N, D) as heads see them, at least float32."""
        features = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
        return (features - self.feature_mean) / self.feature_std if self.standardize else features

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.update_target()

    def update_target(self) -> None:
        """Move the target heads, gains and directions included, towards the trained ones."""
        update_target(self.target_heads, self.heads, self.ema_decay)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.head_losses.zero_()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups: weight decay acts on matrices, of which the gain (K, 1) is one, and not on biases."""
        biases = self.heads.biases
        bias_ids = {id(p) for p in biases}
        others = [p for p in self.heads.parameters() if id(p) not in bias_ids]
        return [{"params": others}, {"params": biases, "weight_decay": 0.0}]

    # The final clustering

    def encode(self, images: Tensor) -> Tensor:
        return self.backbone(images)

    @full_precision
    def cluster_logits(self, features: Tensor) -> Tensor:
        """Return the logits (N, K) of the target head whose loss is lowest in the last epoch."""
        best = self.head_losses.argmin()[None]
        return self.target_heads(self.scale_features(features), best)[0] / self.target_temperature


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sample standard deviation, both (D,), of features (M, D); 1 where all are the same number."""
    std = features.std(0)
    return features.mean(0), torch.where(std > 0, std, 1)


@torch.no_grad()
def renew_marginals(marginals: Tensor, log_t: Tensor, *, momentum: float) -> Tensor:
    """Return the running shares (H, K) of the clusters after a step with these log-probabilities (H, 2N, K)."""
    own_mean = log_t.exp().mean(1) * distributed.global_mean_factor(log_t[0])
    return momentum * marginals + (1 - momentum) * distributed.mean_over_processes(own_mean)


def pair_weights(log_t: Tensor) -> Tensor:
    """Return the weights (N,) of pairs: how probable the heads' targets (H, 2N, K) find it that they share a cluster.

    The mean over heads of sum_k t_x(k) t_n(k), for an image x and its neighbour n.
    """
    log_x, log_n = log_t.chunk(2, dim=1)
    return (log_x + log_n).exp().sum(2).mean(0)


@full_precision
def temi_losses(log_q: Tensor, log_t: Tensor, marginals: Tensor, *, beta: float) -> Tensor:
    """Return the loss (H, N) of each pair in each head, weighted by `pair_weights`.

    w 1/2 (l(x, n) + l(n, x)) with l(v, v') = -log sum_k (q_v(k) t_v'(k))^beta / pi(k). log_q and log_t (H, 2N, K) are
    log-probabilities of the trained and of the target heads, of N images and then of a neighbour of each. Gradients
    reach only the former. `marginals` (H, K) are the shares pi of the clusters.
    """
    log_t = log_t.detach()
    log_t_of_partner = torch.cat(log_t.chunk(2, dim=1)[::-1], 1)
    log_pi = marginals.detach().clamp(min=SMALLEST_SHARE).log()[:, None]
    losses = -torch.logsumexp(beta * (log_q + log_t_of_partner) - log_pi, dim=2)
    return pair_weights(log_t) * sum(losses.chunk(2, dim=1)) / 2
