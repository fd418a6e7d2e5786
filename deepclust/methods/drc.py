"""DRC: deep robust clustering by contrastive learning (Zhong, Chen, Jin, Hua; arXiv 2008.03030).

One linear layer on the backbone gives K numbers per image, the *assignment feature*; its softmax is the *assignment
probability*. Matching only the probabilities of two views leaves the features of a cluster widely spread, because
softmax depends mainly on the largest entry. DRC therefore contrasts both between the views: the features row by row (an
image against the other images) and the probabilities column by column (a cluster over the batch against the other
clusters). The sum of the squared cluster sizes keeps the clusters balanced. The cluster of an image is the arg-max of
the layer.

Differs from the authors' code in: no code was published. What the abstract does not state is taken from third-party
code of the two losses, from PICA (optimiser, epochs, batch size, depth of the network), whose protocol DRC shares, and
from GCC (views, stems), whose authors it shares. Nothing else of PICA is here (see conf/method/drc.yaml). Own choices:
- Similarities are cosines. The formula as printed has inner products; `normalize_features: false` and
  `normalize_probabilities: false` give those.
- `balance_weight` is the weight for a batch of `balance_batch_size` images. It is rescaled for other batch sizes, since
  the term is proportional to N.
- Several processes. Features are gathered with their gradients, so that N is the global batch.

Logged terms:
- `train/feature`: the contrast of images.
- `train/probability`: the contrast of clusters.
- `train/balance`: the weighted sum of the squared cluster sizes.
Images that only help the representation, such as the unlabelled ones of STL-10, count in `train/feature` only.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.losses.balance import squared_cluster_sizes
from deepclust.losses.contrastive import info_nce
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule
from deepclust.number_types import NonNegativeFloat, PositiveFloat, PositiveInt


class DRC(ClusteringMethod):
    """DRC: one linear layer, contrasted before and after its softmax; no state between steps.

    Args (`backbone`, `num_clusters`, `optimizer`, `schedule`: see `ClusteringMethod`):
        feature_temperature: the temperature of the contrast of images.
        probability_temperature: the temperature of the contrast of clusters.
        normalize_features: whether images are compared by cosine; otherwise by inner product.
        normalize_probabilities: whether clusters are compared by cosine; otherwise by inner product.
        balance_weight: lambda, the weight of the squared cluster sizes.
        balance_batch_size: the batch size to which `balance_weight` belongs.
    """

    num_views = 2

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: PositiveInt,
        feature_temperature: PositiveFloat,
        probability_temperature: PositiveFloat,
        normalize_features: bool,
        normalize_probabilities: bool,
        balance_weight: NonNegativeFloat,
        balance_batch_size: PositiveInt,
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
        z_a, z_b = (distributed.all_gather_with_gradient(self.head(self.backbone(view))) for view in batch.views)
        feature, probability, balance = self.compute_terms(z_a, z_b)
        cluster_weight = 0.0 if batch.extra else 1.0
        balance_weight = cluster_weight * self.balance_weight * self.balance_batch_size / len(z_a)
        return {"feature": feature, "probability": cluster_weight * probability, "balance": balance_weight * balance}

    @replayable()
    def compute_terms(self, z_a: Tensor, z_b: Tensor) -> tuple[Tensor, ...]:
        """Return the three unweighted terms from the assignment features (N, K) of both views."""
        feature = feature_contrast(z_a, z_b, temperature=self.feature_temperature, normalize=self.normalize_features)
        return feature, *probability_losses(
            z_a, z_b, temperature=self.probability_temperature, normalize=self.normalize_probabilities
        )

    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.head(features)


@full_precision
def feature_contrast(z_a: Tensor, z_b: Tensor, *, temperature: float, normalize: bool) -> Tensor:
    """Return the contrast of images, a scalar, from the assignment features (N, K) of both views.

    Each row of view a is compared with all rows of view b; there is no term in the other direction.
    """
    if normalize:
        z_a, z_b = F.normalize(z_a, dim=1), F.normalize(z_b, dim=1)
    return info_nce(z_a, z_b, temperature=temperature)


@full_precision
def probability_losses(z_a: Tensor, z_b: Tensor, *, temperature: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """Return the contrast of clusters and the squared cluster sizes of view a, two scalars, from features (N, K)."""
    p_a, p_b = z_a.softmax(1), z_b.softmax(1)
    columns_a, columns_b = (F.normalize(p, dim=0).T if normalize else p.T for p in (p_a, p_b))
    return info_nce(columns_a, columns_b, temperature=temperature), squared_cluster_sizes(p_a)
