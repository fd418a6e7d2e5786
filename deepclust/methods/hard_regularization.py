"""Hard regularisation: k-means in each batch with clusters that cost more the more images they have been given.

Mahon and Lukasiewicz ("Hard regularization to prevent deep online clustering collapse without data augmentation", AAAI
2024, arXiv 2303.16521). There is one stage, one view, no augmentation, and no state between batches.

A linear layer on the backbone gives an embedding z_i; the K centroids are parameters. The images of a batch are
assigned one at a time, the most certain pair of an image and a cluster first: that with the smallest
|z_i - mu_k|^2 / sigma + log(n_k + 1), where n_k counts the images of the batch that cluster k has been given. The loss
is the mean of |z_i - mu_k|^2 / sigma over the images and their clusters; nothing passes through the assignment. In
evaluation an image goes to the nearest centroid, without counts.

`balance` also chooses what the paper compares this with, as the authors' code has it: `none`, the nearest centroid;
`sinkhorn`; and terms that reward even clusters, in which `costs` are the distances above and m_k is their mean over the
batch: `mean_square` 10 mean_k m_k^2, `variance` 10 var_k m_k, `entropy` and `entropy_nearest` -100 times the entropy of
m_k / sum m. Beside them 0.1 of the mean smallest cost is minimised, or with `entropy` 0.1 of the mean entropy of a
row of costs over its sum.

Differs from the authors' code in:
- Epoch. The last one is reported. The authors report the epoch with the best NMI against the labels.
- Prior. Uneven shares, if given, go to the clusters by their sizes in the last epoch, the largest to the largest
  (theirs: matched through the labels). They do not shift the clusters of evaluation.
- Precision. Centroids have the precision of the network (theirs: float64). Distances are float64 in both.
- Optimiser. One Adam has network and centroids; theirs are two with the same numbers, which is the same.
- Sinkhorn. An image goes to the likeliest cluster. In the authors' code it goes to the least likely one.
- STL-10. Each image counts once (theirs: the 5,000 training images twice).
- Several processes. All images of the global batch are assigned together.
On a GPU every step waits for the distances, because the assignment is made on the CPU.

Logged:
- `train/distance`: the loss above. It falls as the embeddings gather around the centroids.
- `train/balance`: the term that rewards even clusters, for the kinds that have one.
- `train/size_divergence`: sum_k p_k log(p_k / prior_k) of the shares p_k of the images that each cluster was given in
  an epoch; 0 if they are those of the prior, log K if all images are in one of K equal clusters.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.balanced_assignment import cluster_sizes
from deepclust.clustering.greedy_assignment import greedy_log_count
from deepclust.clustering.kmeans_distances import centroid_logits, squared_distances
from deepclust.clustering.sinkhorn import sinkhorn_assignments
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule
from deepclust.number_types import PositiveFloat, PositiveInt

SoftBalance = Literal["mean_square", "variance", "entropy", "entropy_nearest"]


class HardRegularization(ClusteringMethod):
    """Online k-means with the log of the cluster sizes as a cost, or with another way to keep the clusters even.

    Args (`backbone`, `num_clusters`, `optimizer`, `schedule`: see `ClusteringMethod`):
        embedding_size: size D of the embedding, that of a linear layer on the backbone.
        sigma: what squared distances are divided by. The smaller, the less the cluster sizes count.
        balance: how clusters are kept even, as the docstring of the module lists it; `log_count` is the method.
        count_over: whether the counts of `log_count` begin anew with every batch or with every epoch.
        prior: the shares of the clusters, in any order and to any sum; None: equal ones. For `log_count` only.
        sinkhorn_epsilon: for `sinkhorn`, by what minus the costs are divided.
        sinkhorn_iterations: for `sinkhorn`, how often columns and rows are scaled.

    Raises:
        InputError: if the prior has not one share for each cluster.
    """

    num_views = 1
    sizes: Tensor
    previous_sizes: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: PositiveInt,
        embedding_size: PositiveInt,
        sigma: PositiveFloat,
        balance: Literal["log_count", "sinkhorn", "none", "mean_square", "variance", "entropy", "entropy_nearest"],
        count_over: Literal["batch", "epoch"],
        prior: Sequence[PositiveFloat] | None,
        sinkhorn_epsilon: PositiveFloat,
        sinkhorn_iterations: PositiveInt,
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
        if prior is not None and len(prior) != num_clusters:
            raise InputError(
                f"method.prior has {len(prior)} shares for {num_clusters} clusters",
                expected="one share for each cluster",
                do=f"give {num_clusters} numbers in method.prior, or null for equal shares",
            )
        self.projector = nn.Linear(backbone.num_features, embedding_size)  # type: ignore[arg-type]
        self.centroids = nn.Parameter(torch.randn(num_clusters, embedding_size))
        self.sigma = sigma
        self.balance = balance
        self.count_over = count_over
        shares = torch.tensor([1.0] * num_clusters if prior is None else list(prior), dtype=torch.float64)
        self.prior = (shares / shares.sum()).sort(descending=True).values
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        # Images given to each cluster in this epoch and in the one before
        self.register_buffer("sizes", torch.zeros(num_clusters, dtype=torch.int64))
        self.register_buffer("previous_sizes", torch.zeros(num_clusters, dtype=torch.int64))

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        if batch.extra:
            raise InputError(
                "the data set has extra images, and hard regularisation learns only from images that it clusters",
                expected="only images that are clustered",
                do="set dataset.source.extra=[]",
            )
        costs = self.compute_costs(self.encode(batch.views[0]))
        all_costs = distributed.all_gather_with_gradient(costs)
        assignments = self.assign(all_costs.detach())
        self.sizes += cluster_sizes(assignments, self.sizes)
        if self.balance in ("log_count", "sinkhorn", "none"):
            own = assignments[batch.draws.local_rows(len(costs))]
            # The mean over the global batch. DDP averages over processes, whose parts of it may differ in size.
            return {"distance": assigned_cost(costs, own) * (len(costs) * distributed.world_size() / len(all_costs))}
        balance, distance = soft_balance_terms(all_costs, self.balance)  # type: ignore[arg-type]
        return {"distance": distance, "balance": balance}

    @replayable()
    @full_precision
    def compute_costs(self, embeddings: Tensor) -> Tensor:
        """Return |z_i - mu_k|^2 / sigma (N, K) of embeddings (N, D), in float64."""
        return squared_distances(embeddings.double(), self.centroids.double()) / self.sigma

    @torch.no_grad()
    def assign(self, costs: Tensor) -> Tensor:
        """Return the clusters (N,) that the images of the global batch with these `costs` (N, K) are trained on."""
        if self.balance == "log_count":
            counts = self.sizes if self.count_over == "epoch" else torch.zeros_like(self.sizes)
            return greedy_log_count(costs - self.order_prior().log(), counts)
        if self.balance == "sinkhorn":
            epsilon, iterations = self.sinkhorn_epsilon, self.sinkhorn_iterations
            return sinkhorn_assignments(-costs, epsilon=epsilon, iterations=iterations).argmax(1)
        return costs.argmin(1)

    def order_prior(self) -> Tensor:
        """Return the share (K,) of each cluster: the largest for the largest of the last epoch; equal in the first."""
        prior = self.prior.to(self.sizes.device)
        by_size = self.previous_sizes.argsort(descending=True, stable=True)
        ordered = torch.empty_like(prior).scatter_(0, by_size, prior)
        return torch.where(self.previous_sizes.any(), ordered, 1 / len(prior))

    # Epochs

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.previous_sizes.copy_(self.sizes)
        self.sizes.zero_()

    def on_train_epoch_end(self) -> None:
        self.log("train/size_divergence", size_divergence(self.sizes, self.order_prior()))

    # The final clustering

    def encode(self, images: Tensor) -> Tensor:
        return self.projector(self.backbone(images))

    def cluster_logits(self, features: Tensor) -> Tensor:
        return centroid_logits(features, self.centroids, metric="euclidean") / self.sigma


def assigned_cost(costs: Tensor, assignments: Tensor) -> Tensor:
    """Return the mean over images of the one of their `costs` (N, K) that `assignments` (N,) name, a scalar."""
    return costs.gather(1, assignments[:, None]).mean()


def soft_balance_terms(costs: Tensor, kind: SoftBalance) -> tuple[Tensor, Tensor]:
    """Return the term that rewards even clusters and the one that pulls images to them, from costs (N, K) above 0.

    The weights are those of the authors' code. The terms are on the costs themselves, not on probabilities.
    """
    means = costs.mean(0)
    if kind == "mean_square":
        balance = 10 * means.square().mean()
    elif kind == "variance":
        balance = 10 * means.var(correction=min(len(means) - 1, 1))  # 0, and not NaN, for one cluster
    else:
        balance = -100 * entropy(means / means.sum())
    if kind == "entropy":
        return balance, 0.1 * entropy(costs / costs.sum(1, keepdim=True)).mean()
    return balance, 0.1 * costs.amin(1).mean()


def entropy(shares: Tensor) -> Tensor:
    """Return the entropies (...) of shares (..., K), with 0 log 0 = 0."""
    return -(shares * torch.where(shares > 0, shares, 1).log()).sum(-1)


def size_divergence(sizes: Tensor, prior: Tensor) -> Tensor:
    """Return sum_k p_k log(p_k / prior_k + 1e-8), a scalar, of the shares p_k of cluster `sizes` (K,)."""
    shares = sizes / sizes.sum()
    return (shares * (shares / prior + 1e-8).log()).sum()
