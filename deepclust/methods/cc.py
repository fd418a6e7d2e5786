"""CC: contrastive clustering (Li, Hu, Liu, Peng, Zhou, Peng; AAAI 2021, arXiv 2009.09687).

Two views of an image go through one backbone and two heads. The instance head gives an embedding, and its rows are
contrasted: a row belongs to the same image in the other view. The cluster head gives soft assignments, and their
columns are contrasted: a column, that is a cluster seen over the batch, belongs to the same cluster in the other
view. The entropy of the mean assignment keeps the clusters even. The clustering is the arg-max of the cluster head.

Differs from the authors' code in:
- a cluster without any mass: 0 log 0 is 0 and its cosines are 0; theirs is not a number.
- several processes: embeddings and assignments are gathered with their gradients, so that N is the global batch; theirs
  runs on one device.
- the batch size is read from the batch, which matters where a last, smaller batch is kept.

Logged: `train/instance`, contrast of images; `train/cluster`, contrast of clusters; `train/balance`, what the entropies
of the mean assignments of both views lack to log K together (0 is best). Images that only help the representation, such
as STL-10's unlabelled ones, count in the first alone.
"""

import logging
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.losses.balance import entropy_deficit
from deepclust.losses.contrastive import nt_xent
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule

log = logging.getLogger(__name__)
PAPER_BATCH_SIZE = 256


class CC(ClusteringMethod):
    """CC: an instance head and a cluster head on one backbone, trained together; no state between steps."""

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: int,
        embedding_size: int,
        instance_temperature: float,
        cluster_temperature: float,
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
        self.instance_head = head(backbone.num_features, embedding_size)  # type: ignore[arg-type]
        self.cluster_head = head(backbone.num_features, num_clusters)  # type: ignore[arg-type]
        self.instance_temperature = instance_temperature
        self.cluster_temperature = cluster_temperature

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        # Each view on its own, so that batch statistics are a view's.
        (u_a, logits_a), (u_b, logits_b) = (self.heads(self.backbone(view)) for view in batch.views)
        instance, cluster, balance = self.objective(u_a, u_b, logits_a, logits_b)
        weight = 0.0 if batch.extra else 1.0
        return {"instance": instance, "cluster": weight * cluster, "balance": weight * balance}

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) before they are normalised and cluster logits (N, K), of the global batch."""
        u, logits = self.instance_head(features), self.cluster_head(features)
        return distributed.gather_with_gradient(u), distributed.gather_with_gradient(logits)

    @replayable()
    def objective(self, u_a: Tensor, u_b: Tensor, logits_a: Tensor, logits_b: Tensor) -> tuple[Tensor, ...]:
        """The three terms of the embeddings (N, D) and logits (N, K) of both views, by themselves."""
        instance = instance_loss(u_a, u_b, temperature=self.instance_temperature)
        return instance, *cluster_losses(logits_a, logits_b, temperature=self.cluster_temperature)

    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.cluster_head(features)

    def on_fit_start(self) -> None:
        size = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        if size != PAPER_BATCH_SIZE and distributed.rank() == 0:
            log.warning(
                "CC contrasts clusters over the batch, so batch_size is part of it: %d here, %d in the paper",
                size,
                PAPER_BATCH_SIZE,
            )


def head(in_features: int, out_features: int) -> nn.Sequential:
    """Linear, ReLU, Linear, as wide inside as its input."""
    return nn.Sequential(nn.Linear(in_features, in_features), nn.ReLU(), nn.Linear(in_features, out_features))


@full_precision
def instance_loss(u_a: Tensor, u_b: Tensor, *, temperature: float) -> Tensor:
    """Contrast of images: of the embeddings (N, D) of both views before they are normalised; a scalar."""
    return nt_xent(F.normalize(u_a, dim=1), F.normalize(u_b, dim=1), temperature=temperature)


@full_precision
def cluster_losses(logits_a: Tensor, logits_b: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Contrast of clusters, and how uneven they are: of the logits (N, K) of both views; two scalars."""
    c_a, c_b = logits_a.softmax(1), logits_b.softmax(1)
    return cluster_contrast(c_a, c_b, temperature=temperature), entropy_deficit(c_a) + entropy_deficit(c_b)


def cluster_contrast(c_a: Tensor, c_b: Tensor, *, temperature: float) -> Tensor:
    """Contrast of the columns of soft assignments (N, K) of both views, by cosine; an empty column has cosine 0."""
    return nt_xent(unit_columns(c_a), unit_columns(c_b), temperature=temperature)


def unit_columns(assignments: Tensor) -> Tensor:
    """The columns (K, N) of soft assignments (N, K) over their lengths, for which 1e-8 is taken at least.

    The gradient knows nothing of that bound, as in torch's cosine similarity, the authors' choice: it tells in
    clusters that are almost empty.
    """
    lengths = assignments.norm(dim=0)
    bounded = lengths + (lengths.clamp(min=1e-8) - lengths).detach()
    return (assignments / bounded).T
