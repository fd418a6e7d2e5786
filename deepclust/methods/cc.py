"""CC: contrastive clustering (Li, Hu, Liu, Peng, Zhou, Peng; AAAI 2021, arXiv 2009.09687).

Two views of each image go through one backbone and two heads. The instance head gives embeddings. Their rows are
contrasted: the positive of a row is the row of the same image in the other view. The cluster head gives soft
assignments. Their columns are contrasted: a column describes a cluster by its assignments over the batch, and its
positive is the column of the same cluster in the other view. The entropy of the mean assignment keeps the clusters
balanced. The cluster of an image is the arg-max of the cluster head.

Differs from the authors' code in:
- An empty cluster. Here 0 log 0 is 0 and the cosines of an empty column are 0; the authors' loss is not a number.
- Several processes. Embeddings and assignments are gathered with their gradients, so that N is the global batch. The
  authors' code runs on one device.
- The batch size. It is read from the batch, which matters where a smaller last batch is kept; theirs is fixed.

Logged terms:
- `train/instance`: the contrast of images.
- `train/cluster`: the contrast of clusters.
- `train/balance`: log K minus the entropy of the mean assignment, summed over both views (0 is best).
Images that only help the representation, such as the unlabelled ones of STL-10, count in `train/instance` only.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.losses.balance import cluster_size_entropy_deficit
from deepclust.losses.contrastive import nt_xent
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule
from deepclust.number_types import PositiveFloat, PositiveInt

log = logging.getLogger(__name__)
PAPER_BATCH_SIZE = 256


class CC(ClusteringMethod):
    """CC: an instance head and a cluster head on one backbone, trained together; no state between steps.

    Args (`backbone`, `num_clusters`, `optimizer`, `schedule`: see `ClusteringMethod`):
        embedding_size: the size D of the instance head's embeddings z.
        instance_temperature: tau_I, the temperature of the contrast of images.
        cluster_temperature: tau_C, the temperature of the contrast of clusters.
    """

    num_views = 2

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: PositiveInt,
        embedding_size: PositiveInt,
        instance_temperature: PositiveFloat,
        cluster_temperature: PositiveFloat,
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
        self.instance_head = make_head(backbone.num_features, embedding_size)  # type: ignore[arg-type]
        self.cluster_head = make_head(backbone.num_features, num_clusters)  # type: ignore[arg-type]
        self.instance_temperature = instance_temperature
        self.cluster_temperature = cluster_temperature

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        # Each view goes through the backbone by itself, so that batch normalisation sees one view at a time.
        (u_a, logits_a), (u_b, logits_b) = (self.apply_heads_and_gather(self.backbone(view)) for view in batch.views)
        instance, cluster, balance = self.compute_terms(u_a, u_b, logits_a, logits_b)
        self.leave_untrained(self.cluster_head.parameters() if batch.extra else ())
        cluster_weight = 0.0 if batch.extra else 1.0
        return {"instance": instance, "cluster": cluster_weight * cluster, "balance": cluster_weight * balance}

    def apply_heads_and_gather(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings (N, D), not normalised, and cluster logits (N, K) of the global batch."""
        u, logits = self.instance_head(features), self.cluster_head(features)
        return distributed.all_gather_with_gradient(u), distributed.all_gather_with_gradient(logits)

    @replayable()
    def compute_terms(self, u_a: Tensor, u_b: Tensor, logits_a: Tensor, logits_b: Tensor) -> tuple[Tensor, ...]:
        """Return the three unweighted terms from the embeddings (N, D) and cluster logits (N, K) of both views."""
        instance = instance_loss(u_a, u_b, temperature=self.instance_temperature)
        return instance, *cluster_losses(logits_a, logits_b, temperature=self.cluster_temperature)

    def parameter_groups(self) -> list[dict[str, Any]]:
        cluster_head = list(self.cluster_head.parameters())
        cluster_head_ids = {id(p) for p in cluster_head}
        # The cluster head is a group of its own because extra images, if there are any, come before its first step.
        # torch's fused SGD initialises the momentum of all weights of a group in the same step.
        return [{"params": [p for p in self.parameters() if id(p) not in cluster_head_ids]}, {"params": cluster_head}]

    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.cluster_head(features)

    def on_fit_start(self) -> None:
        size = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        if size != PAPER_BATCH_SIZE and distributed.rank() == 0:
            log.warning(
                "CC compares clusters over a batch, so its result depends on batch_size: %d here, %d in the paper",
                size,
                PAPER_BATCH_SIZE,
            )


def make_head(in_features: int, out_features: int) -> nn.Sequential:
    """Return Linear, ReLU, Linear, whose hidden layer has `in_features` units."""
    return nn.Sequential(nn.Linear(in_features, in_features), nn.ReLU(), nn.Linear(in_features, out_features))


@full_precision
def instance_loss(u_a: Tensor, u_b: Tensor, *, temperature: float) -> Tensor:
    """Return the contrast of images, a scalar, from the embeddings (N, D) of both views, not normalised."""
    return nt_xent(F.normalize(u_a, dim=1), F.normalize(u_b, dim=1), temperature=temperature)


@full_precision
def cluster_losses(logits_a: Tensor, logits_b: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the contrast of clusters and their imbalance, two scalars, from the logits (N, K) of both views.

    The imbalance is log K minus the entropy of the mean assignment, summed over both views.
    """
    c_a, c_b = logits_a.softmax(1), logits_b.softmax(1)
    contrast = cluster_contrast(c_a, c_b, temperature=temperature)
    imbalance = cluster_size_entropy_deficit(c_a) + cluster_size_entropy_deficit(c_b)
    return contrast, imbalance


def cluster_contrast(c_a: Tensor, c_b: Tensor, *, temperature: float) -> Tensor:
    """Return the contrast of the columns of soft assignments (N, K) of both views, a scalar.

    The similarity is the cosine; that of an empty column is 0.
    """
    return nt_xent(normalized_columns(c_a), normalized_columns(c_b), temperature=temperature)


def normalized_columns(probabilities: Tensor) -> Tensor:
    """Return the columns of soft assignments (N, K) as unit rows (K, N); lengths under 1e-8 are taken as 1e-8.

    The gradient is the one without this lower bound, as in torch's cosine similarity, which the authors use. The
    difference matters for clusters that are almost empty.
    """
    lengths = probabilities.norm(dim=0)
    bounded_lengths = lengths + (lengths.clamp(min=1e-8) - lengths).detach()
    return (probabilities / bounded_lengths).T
