"""DRC: deep robust clustering by contrastive learning (Zhong, Chen, Jin, Hua; arXiv 2008.03030).

One linear layer on the backbone gives K numbers per image, the *assignment feature*; its softmax is the *assignment
probability*. Matching the probabilities of two views alone leaves the features of one cluster widely spread, for
softmax hears the largest entry only. So both are contrasted between the views: the features row by row, an image
against the others, and the probabilities column by column, a cluster over the batch against the others. The sum of
the squared cluster sizes keeps them even. The clustering is the arg-max of the layer.

Differs from the paper or its code in: there is no published code, and what the abstract does not say is filled in from
third-party code of the two losses and from the settings of PICA and GCC, whose protocol and authors it shares.
- similarities are cosines. The formula as printed has products, which `normalize_features: false` and
  `normalize_probabilities: false` give.
- the weight of the sizes belongs to a batch of `balance_batch_size` images and is rescaled for others, since the term
  is in proportion to N.
- several processes: features are gathered with their gradients, so that N is the global batch.

Logged: `train/feature`, contrast of images; `train/probability`, contrast of clusters; `train/balance`, weighted.
Images that only help the representation, such as STL-10's unlabelled ones, count in the first alone.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.losses.balance import squared_sizes
from deepclust.losses.contrastive import info_nce
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule


class DRC(ClusteringMethod):
    """DRC: one linear layer, contrasted before and after its softmax; no state between steps."""

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: int,
        feature_temperature: float,
        probability_temperature: float,
        normalize_features: bool,
        normalize_probabilities: bool,
        balance_weight: float,
        balance_batch_size: int,
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
        self.head = nn.Linear(backbone.num_features, num_clusters)  # type: ignore[arg-type]
        self.feature_temperature = feature_temperature
        self.probability_temperature = probability_temperature
        self.normalize_features = normalize_features
        self.normalize_probabilities = normalize_probabilities
        self.balance_weight = balance_weight
        self.balance_batch_size = balance_batch_size

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        z_a, z_b = (distributed.gather_with_gradient(self.head(self.backbone(view))) for view in batch.views)
        feature, probability, sizes = self.objective(z_a, z_b)
        weight = 0.0 if batch.extra else 1.0
        balance_weight = weight * self.balance_weight * self.balance_batch_size / len(z_a)
        return {"feature": feature, "probability": weight * probability, "balance": balance_weight * sizes}

    @replayable()
    def objective(self, z_a: Tensor, z_b: Tensor) -> tuple[Tensor, ...]:
        """The three terms of the assignment features (N, K) of both views, by themselves."""
        feature = feature_contrast(z_a, z_b, temperature=self.feature_temperature, normalize=self.normalize_features)
        return feature, *probability_losses(
            z_a, z_b, temperature=self.probability_temperature, normalize=self.normalize_probabilities
        )

    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.head(features)


@full_precision
def feature_contrast(z_a: Tensor, z_b: Tensor, *, temperature: float, normalize: bool) -> Tensor:
    """Contrast of images: of the assignment features (N, K) of both views, rows of a against all of b; a scalar."""
    if normalize:
        z_a, z_b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    return info_nce(z_a, z_b, temperature=temperature)


@full_precision
def probability_losses(z_a: Tensor, z_b: Tensor, *, temperature: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """Contrast of clusters, and their squared sizes in view a: of the assignment features (N, K); two scalars."""
    p_a, p_b = z_a.softmax(1), z_b.softmax(1)
    columns_a, columns_b = (F.normalize(p, dim=0).T if normalize else p.T for p in (p_a, p_b))
    return info_nce(columns_a, columns_b, temperature=temperature), squared_sizes(p_a)
