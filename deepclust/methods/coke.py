"""CoKe: online constrained k-means (Qian, Xu, Hu, Li, Jin; CVPR 2022, arXiv 2105.11527).

Every epoch does two things. *Clustering*, without gradient: each batch is assigned to running centroids under a lower
bound on the cluster sizes, which dual variables enforce, and the centroids follow as running means over the epoch.
*Classification*: the network learns to predict the cluster that each image got in the previous epoch (its
pseudo-label), using the centroids as they stood at the end of that epoch (the frozen centroids).

There are three variants. With two views, the target of a view mixes the pseudo-label with the prediction for the other
view. Small crops, if there are any, learn the mean target of the two large views and are not clustered. With a single
view, the last epochs can average pseudo-labels and centroids. Several heads with different K share one embedding. The
network does not move in the first epoch (its learning rate is 0), which only creates the first clusters.

Differs from the authors' code in:
- Data sets. The authors cover ImageNet with ResNet-50 only. They learn a representation for linear classifiers, without
  a head of `num_clusters` clusters, so k-means evaluates it. Small data sets use SeCu's settings here (network, kinds
  of views, optimiser), with two views and no predictor. This is a port and not a reproduction.
- Final clustering. It comes from the head whose K is `num_clusters` and uses the running centroids. Between two epochs
  they equal the frozen ones.
- Several processes. Losses are means over the global batch, even if the processes hold unequal parts of it.
- Images without an earlier pseudo-label (`drop_last` leaves some out). They learn their new one.
- Label slots. An empty slot holds no label (theirs: label 1 with weight 0), so another label may be dropped first.
- Initialisation. A replaced ResNet stem starts as torch does it (SeCu's code: He-normal, about half as large).
- Precision. Products of embeddings and centroids, and losses, are float32 under mixed precision (theirs: float16).

Logged:
- `train/classification`: the cross-entropy. For a network that knows nothing it is about the mean of log K over heads.
- `train/clusters_in_batch`: the number of clusters of the first head that occur in a batch. 1 means collapse.
- `train/smallest_cluster`, `train/largest_cluster`: their shares of all images, in the first head, at an epoch's end.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.balanced_assignment import SizeConstraint, cluster_sizes
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.losses.discrimination import cross_entropy_per_row, mix_with_other_view
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.heads import three_layer_mlp, two_layer_mlp
from deepclust.nn.one_hot import one_hot_mask
from deepclust.nn.schedules import Schedule
from deepclust.number_types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class CentroidHead(nn.Module):
    """The K centroids of one head in two versions, and the constraint that balances their clusters.

    `frozen` (D, K) stays the same for an epoch and gives the logits of the loss. `running` (D, K) holds the means of
    the features that the epoch has shown so far and assigns the clusters.
    """

    frozen: Tensor
    running: Tensor

    def __init__(self, *, num_features: int, balance: SizeConstraint) -> None:
        super().__init__()
        start = F.normalize(torch.randn(num_features, len(balance.counts)), dim=0)
        self.register_buffer("frozen", start)  # (D, K)
        self.register_buffer("running", start.clone())  # (D, K)
        self.balance = balance

    def assign(self, features: Tensor, *, averaging: bool) -> Tensor:
        """Return the assignments (N,) of features (N, D). While epochs are averaged, the frozen centroids decide."""
        return self.balance.assign(features @ (self.frozen if averaging else self.running), None)

    def update(self, features: Tensor, assignments: Tensor, *, averaging: bool) -> None:
        """Update duals, counts and running centroids with the features (N, D) and assignments (N,) of the global batch.

        The first features that a cluster gets in an epoch replace its inherited centroid.
        """
        old_counts = self.balance.counts.clone()
        members = one_hot_mask(assignments, len(old_counts)).to(features.dtype)
        self.balance.update(assignments, None)
        means = (self.running * old_counts + features.T @ members) / self.balance.counts.clamp(min=1)
        if not averaging:
            means = F.normalize(means, dim=0)
        self.running.copy_(torch.where(members.any(0), means, self.running))

    def freeze_centroids_and_reset_counts(self, weight: float, *, averaging: bool) -> None:
        """Make the running centroids the frozen ones of the next epoch, whose counts start at 0.

        If epochs are averaged, the next centroids are the unit means of the frozen ones and the running ones. `weight`
        is the weight of the running ones.
        """
        if averaging:
            means = (1 - weight) * self.frozen + weight * F.normalize(self.running, dim=0)
            self.running.copy_(F.normalize(means, dim=0))
        self.frozen.copy_(self.running)
        self.balance.end_epoch()


class PseudoLabelMemory(nn.Module):
    """The pseudo-labels of every image in every head: a table of `num_slots` pairs (label, weight) for each.

    Until `averaging_epoch` (counted from 0) an image has one pseudo-label, the one from its last epoch, in slot 0. From
    then on the pseudo-labels of all epochs are averaged with equal weights, as far as the slots suffice. With one slot
    nothing is ever averaged.
    """

    labels: Tensor
    weights: Tensor
    following: Tensor

    def __init__(self, *, num_heads: int, num_images: int, num_slots: int, averaging_epoch: int) -> None:
        super().__init__()
        self.averaging_epoch = averaging_epoch
        self.register_buffer("labels", torch.full((num_heads, num_images, num_slots), -1))  # -1: empty
        self.register_buffer("weights", torch.zeros(num_heads, num_images, num_slots))
        # The slot that a new label overwrites next
        self.register_buffer("following", torch.zeros(num_heads, num_images, dtype=torch.int64))

    def read_targets(self, head: int, indices: Tensor, num_clusters: int, *, epoch: int, temperature: float) -> Tensor:
        """Return the targets (N, K) of the images `indices` (N,): a one-hot pseudo-label, or an average of several.

        The average is a softmax over the summed weights of the labels that occur, at this temperature. Rows of images
        without a pseudo-label are NaN.
        """
        labels, weights = self.labels[head, indices], self.weights[head, indices]
        zeros = torch.zeros(len(labels), num_clusters, dtype=weights.dtype, device=weights.device)
        if epoch <= self.averaging_epoch or labels.shape[1] == 1:
            one_hot = zeros.scatter(1, labels[:, :1].clamp(min=0), 1.0)
            return one_hot.masked_fill(labels[:, :1] < 0, torch.nan)
        cluster_weights = zeros.scatter_add(1, labels.clamp(min=0), weights)
        return (cluster_weights / temperature).masked_fill(cluster_weights <= 0, -torch.inf).softmax(1)

    def write(self, head: int, indices: Tensor, new_labels: Tensor, *, epoch: int) -> None:
        """Store the pseudo-labels `new_labels` (N,) that the images `indices` (N,) got in this epoch."""
        num_slots = self.labels.shape[2]
        if epoch <= self.averaging_epoch or num_slots == 1:
            self.labels[head, indices, 0] = new_labels
            if epoch == self.averaging_epoch and num_slots > 1:
                self.weights[head, indices, 0] = 1.0
                self.following[head, indices] = 1
            return
        labels, weights = self.labels[head, indices], self.weights[head, indices]
        match = labels == new_labels.unsqueeze(1)
        is_stored = match.any(1)
        last_match = num_slots - 1 - match.flip(1).int().argmax(1)
        slot = torch.where(is_stored, last_match, self.following[head, indices]).unsqueeze(1)
        dropped = weights.gather(1, slot).masked_fill(is_stored.unsqueeze(1), 0.0)
        weight = averaging_weight(epoch, self.averaging_epoch)
        # Several slots often have the same weight up to rounding, and the last bits decide which of them is overwritten
        # next. The order of these operations is therefore that of the authors' code.
        remaining = weights.scatter_add(1, slot, -dropped) * ((1 - weight) / (1 - dropped))
        weights = remaining.scatter_add(1, slot, torch.full_like(dropped, weight))
        self.labels[head, indices] = labels.scatter(1, slot, new_labels.unsqueeze(1))
        self.weights[head, indices] = weights
        self.following[head, indices] = weights.argmin(1)


def averaging_weight(epoch: int, averaging_epoch: int) -> float:
    """Return the weight of an epoch in the running average: 1 up to the first averaged epoch, then 1/2, 1/3, ..."""
    return 1 / (max(0, epoch - averaging_epoch) + 1)


class CoKe(ClusteringMethod):
    """CoKe with one view, with two views, or with two large views and any number of small crops after them.

    The arguments not listed here are those of `ClusteringMethod`. Symbols are those of the paper and its code.

    Args of the networks:
        embedding_size: size D of the embedding that all heads share.
        hidden_size: width of the hidden layers of projector and predictor.
        projector_layers: linear layers of the projector: 2, or 3 with batch normalisation at the end (ImageNet).
        predictor_weight: share of the loss on the predictor's output (beta for a single view). 0: no predictor.

    Args of the clustering:
        num_images: number M of images that are clustered; each has a remembered pseudo-label.
        head_multiples: number of clusters of each head, in multiples of `num_clusters`.
        dual_step: step size eta of the dual variables.
        min_share: lower bound gamma on a cluster's size, as a share of M / K. 1 asks for equal sizes.

    Args of the objective:
        temperature: temperature T of the logits.
        label_weight: weight alpha of the pseudo-label in the target of two views; the rest is the other view's.
        small_crops_weight: share 1 - beta of the small crops in the loss. It has no effect on fewer than three views.

    Args of the averaging in the last epochs (single view):
        epochs: number of epochs of the training.
        averaging_epochs: number of last epochs in which pseudo-labels and centroids are averaged. 0: none.
        num_slots: number S of different pseudo-labels that are remembered for an image.
        label_temperature: temperature of the softmax that turns averaged pseudo-labels into targets.
    """

    clusters_in_batch: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_images: PositiveInt,
        num_clusters: PositiveInt,
        head_multiples: Annotated[Sequence[PositiveInt], MinLen(1)],
        embedding_size: PositiveInt,
        hidden_size: PositiveInt,
        projector_layers: Literal[2, 3],
        predictor_weight: Fraction,
        small_crops_weight: Fraction,
        temperature: PositiveFloat,
        label_weight: Fraction,
        dual_step: NonNegativeFloat,
        min_share: Fraction,
        epochs: NonNegativeInt,
        averaging_epochs: NonNegativeInt,
        num_slots: PositiveInt,
        label_temperature: PositiveFloat,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
        e_step_every_n_epochs: NonNegativeInt,
    ) -> None:
        super().__init__(
            backbone=backbone,
            num_clusters=num_clusters,
            optimizer=optimizer,
            schedule=schedule,
            e_step_every_n_epochs=e_step_every_n_epochs,
        )
        make_projector = two_layer_mlp if projector_layers == 2 else three_layer_mlp
        self.projector = make_projector(backbone.num_features, hidden_size, embedding_size)  # type: ignore[arg-type]
        self.predictor = two_layer_mlp(embedding_size, hidden_size, embedding_size) if predictor_weight else None
        self.head_multiples = list(head_multiples)
        self.heads = nn.ModuleList()
        for multiple in head_multiples:
            balance = SizeConstraint(num_clusters=num_clusters * multiple, step=dual_step, min_share=min_share)
            self.heads.append(CentroidHead(num_features=embedding_size, balance=balance))
        self.register_buffer("clusters_in_batch", torch.zeros((), dtype=torch.int64), persistent=False)
        self.averaging_epoch = epochs - averaging_epochs  # the first averaged one, counted from 0
        self.memory = PseudoLabelMemory(
            num_heads=len(self.heads),
            num_images=num_images,
            num_slots=num_slots,
            averaging_epoch=self.averaging_epoch,
        )
        self.predictor_weight = predictor_weight
        self.small_crops_weight = small_crops_weight
        self.temperature = temperature
        self.label_weight = label_weight
        self.label_temperature = label_temperature

    @property
    def centroid_heads(self) -> list[CentroidHead]:
        """The heads, with their type."""
        return list(self.heads)  # type: ignore[arg-type]

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        batch.refuse_extra_images("and CoKe remembers a cluster of every image it learns from")
        projections = [self.projector(self.backbone(view)) for view in batch.views]
        predictions = [self.predictor(z) for z in projections] if self.predictor else None
        image_losses = self.compute_terms_and_update_clusters(
            torch.stack(projections), torch.stack(predictions) if predictions else None, batch.indices
        )
        # The mean over the global batch. DDP averages over processes, whose parts of it may differ in size.
        return {"classification": image_losses.sum() * distributed.world_size() / batch.draws.global_batch_size}

    @replayable(
        constants=lambda self: self.current_epoch == 0, when=lambda self: self.current_epoch < self.averaging_epoch
    )
    @full_precision
    def compute_terms_and_update_clusters(
        self, projections: Tensor, predictions: Tensor | None, indices: Tensor
    ) -> Tensor:
        """Cluster the global batch, and return the loss of each image (N,) as the mean over heads.

        projections and predictions (V, N, D) are not normalised. Their first one or two views are the large ones. The
        clustering changes duals, counts, running centroids, pseudo-labels and `clusters_in_batch`.
        """
        projections = F.normalize(projections, dim=2)
        label_targets = self.update_clusters_and_read_targets(projections[:2].detach().mean(0), indices)
        outputs = [(1 - self.predictor_weight, projections)]
        if predictions is not None:
            outputs.append((self.predictor_weight, F.normalize(predictions, dim=2)))
        losses = []
        for head, label_target in zip(self.centroid_heads, label_targets, strict=True):
            targets = label_target.unsqueeze(0)
            if len(projections) > 1:
                view_logits = projections[:2] @ head.frozen / self.temperature
                targets = mix_with_other_view(label_target, view_logits, label_weight=self.label_weight)
            for weight, rows in outputs:
                logits = rows @ head.frozen / self.temperature
                loss = cross_entropy_per_row(logits[:2], targets).mean(0)
                if len(logits) > 2:
                    mean_target = targets.mean(0).expand(len(logits) - 2, -1, -1)
                    small = cross_entropy_per_row(logits[2:], mean_target).mean(0)
                    loss = torch.lerp(loss, small, self.small_crops_weight)
                losses.append(weight * loss)
        return torch.stack(losses).sum(0) / len(label_targets)

    @torch.no_grad()
    def update_clusters_and_read_targets(self, features: Tensor, indices: Tensor) -> list[Tensor]:
        """Assign the global batch and update all heads with it; return the targets (N, K) of this process by head.

        features (N, D) are means of the unit projections of the large views and are not normalised again. Targets are
        made of the pseudo-labels of earlier epochs. In the first epoch, and for images that have no earlier
        pseudo-label, they are made of the new ones.
        """
        epoch, memory = self.current_epoch, self.memory
        averaging = epoch >= self.averaging_epoch
        all_features, all_indices = distributed.all_gather(features), distributed.all_gather(indices)
        targets = []
        for head_index, head in enumerate(self.centroid_heads):
            entries = (head_index, indices, len(head.balance.counts))
            old_targets = memory.read_targets(*entries, epoch=epoch, temperature=self.label_temperature)
            assignments = head.assign(all_features, averaging=averaging)
            head.update(all_features, assignments, averaging=averaging)
            memory.write(head_index, all_indices, assignments, epoch=epoch)
            new_targets = memory.read_targets(*entries, epoch=epoch, temperature=self.label_temperature)
            targets.append(torch.where(old_targets.isnan() | (epoch == 0), new_targets, old_targets))
            if head_index == 0:
                self.clusters_in_batch.copy_((cluster_sizes(assignments, head.balance.counts) > 0).sum())
        return targets

    # Epochs

    def on_train_epoch_end(self) -> None:
        counts = self.centroid_heads[0].balance.counts
        shares = counts / counts.sum()
        self.log_dict({"train/smallest_cluster": shares.min(), "train/largest_cluster": shares.max()})
        epoch, start = self.current_epoch, self.averaging_epoch
        for head in self.centroid_heads:
            head.freeze_centroids_and_reset_counts(averaging_weight(epoch, start), averaging=epoch >= start)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/clusters_in_batch", self.clusters_in_batch.float())

    # The final clustering

    def encode(self, images: Tensor) -> Tensor:
        return F.normalize(self.projector(self.backbone(images)), dim=1)

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        if 1 not in self.head_multiples:
            return None
        head = self.centroid_heads[self.head_multiples.index(1)]
        return features @ F.normalize(head.running, dim=0) / self.temperature
