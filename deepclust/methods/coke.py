"""CoKe: online constrained k-means (Qian, Xu, Hu, Li, Jin; CVPR 2022, arXiv 2105.11527).

An epoch is two things at once. *Clustering*, without gradient: every batch is assigned to running centroids under a
lower bound on cluster sizes, kept by dual variables, and moves them as running means of the epoch. *Classification*:
the network learns the clusters that the images were given in the epoch before, against the centroids as that epoch
left them. With two views the label is mixed with what the other view says; small crops, where there are any, learn
the mean target of the two large ones and take no part in the clustering; with a single view the last epochs may
average labels and centroids. Heads of several K share one embedding. The network stands still in the first epoch
(rate 0).

Differs from the authors' code in:
- data sets: theirs covers ImageNet with ResNet-50 only, a representation for linear classifiers, without a head of
  `num_clusters` clusters (k-means judges it). Here the small sets take SeCu's recipe for network, views and
  optimiser, two views and no predictor: a port, not a reproduction.
- own clusters: those of the head whose K is `num_clusters`, by the running centroids, which are the frozen ones
  between two epochs.
- several processes: losses are means over the global batch, also where its shares are uneven.
- an image that no earlier epoch has labelled (batches left out by drop_last) learns its new label.
- products of embeddings and centroids, and losses, are float32 under reduced precision (theirs: float16).

Logged: `train/classification`, a cross-entropy, about the mean of log K over the heads where nothing is known;
`train/clusters_in_batch`, how many clusters of the first head a batch fell into (1: collapse);
`train/smallest_cluster` and `train/largest_cluster`, shares of the first head at the end of an epoch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.balanced_assignment import SizeBalance, sizes
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.losses.discrimination import cross_entropies, mixed_targets
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.heads import deep_mlp, mlp
from deepclust.nn.one_hot import one_hot_mask
from deepclust.nn.schedules import Schedule


class CentroidHead(nn.Module):
    """K unit centroids twice: frozen for the epoch, and running means of the rows that the epoch has shown so far."""

    frozen: Tensor
    running: Tensor

    def __init__(self, *, num_features: int, balance: SizeBalance) -> None:
        super().__init__()
        start = F.normalize(torch.randn(num_features, len(balance.counts)), dim=0)
        self.register_buffer("frozen", start)  # (D, K)
        self.register_buffer("running", start.clone())  # (D, K)
        self.balance = balance

    def assign(self, features: Tensor, *, averaging: bool) -> Tensor:
        """Clusters (N,) of features (N, D); by the frozen centroids while epochs are averaged."""
        return self.balance.assign(features @ (self.frozen if averaging else self.running), None)

    def update(self, features: Tensor, labels: Tensor, *, averaging: bool) -> None:
        """Duals, counts and running centroids by the global batch (N, D) and its labels (N,).

        The first rows that a cluster gets in an epoch replace what it inherited.
        """
        before = self.balance.counts.clone()
        members = one_hot_mask(labels, len(before)).to(features.dtype)
        self.balance.update(labels, None)
        means = (self.running * before + features.T @ members) / self.balance.counts.clamp(min=1)
        if not averaging:
            means = F.normalize(means, dim=0)
        self.running.copy_(torch.where(members.any(0), means, self.running))

    def end_epoch(self, weight: float, *, averaging: bool) -> None:
        """Let the running centroids, with this weight beside the frozen ones while averaging, be the next epoch's."""
        if averaging:
            means = (1 - weight) * self.frozen + weight * F.normalize(self.running, dim=0)
            self.running.copy_(F.normalize(means, dim=0))
        self.frozen.copy_(self.running)
        self.balance.end_epoch()


class LabelMemory(nn.Module):
    """The clusters that every image was given: `num_slots` of (label, weight), and which one is written next.

    Up to `averaging_epoch` (from 0) an image has one label, that of its last epoch, in slot 0. From then on the
    labels of the epochs are averaged, each with the same weight, as far as the slots go. One slot: never.
    """

    labels: Tensor
    weights: Tensor
    following: Tensor

    def __init__(self, *, num_heads: int, num_images: int, num_slots: int, averaging_epoch: int) -> None:
        super().__init__()
        self.averaging_epoch = averaging_epoch
        self.register_buffer("labels", torch.full((num_heads, num_images, num_slots), -1))  # -1: empty
        self.register_buffer("weights", torch.zeros(num_heads, num_images, num_slots))
        self.register_buffer("following", torch.zeros(num_heads, num_images, dtype=torch.int64))

    def read(self, head: int, indices: Tensor, num_clusters: int, *, epoch: int, temperature: float) -> Tensor:
        """Targets (N, K) of the images `indices`: a label, or a softmax over averaged ones; NaN where none is held."""
        labels, weights = self.labels[head, indices], self.weights[head, indices]
        empty = torch.zeros(len(labels), num_clusters, dtype=weights.dtype, device=weights.device)
        if epoch <= self.averaging_epoch or labels.shape[1] == 1:
            one_hot = empty.scatter(1, labels[:, :1].clamp(min=0), 1.0)
            return one_hot.masked_fill(labels[:, :1] < 0, torch.nan)
        held = empty.scatter_add(1, labels.clamp(min=0), weights)
        return (held / temperature).masked_fill(held <= 0, -torch.inf).softmax(1)

    def write(self, head: int, indices: Tensor, new: Tensor, *, epoch: int) -> None:
        """Put the labels `new` (N,) of this epoch to the images `indices`."""
        num_slots = self.labels.shape[2]
        if epoch <= self.averaging_epoch or num_slots == 1:
            self.labels[head, indices, 0] = new
            if epoch == self.averaging_epoch and num_slots > 1:
                self.weights[head, indices, 0] = 1.0
                self.following[head, indices] = 1
            return
        labels, weights = self.labels[head, indices], self.weights[head, indices]
        match = labels == new.unsqueeze(1)
        known = match.any(1)
        last = num_slots - 1 - match.flip(1).int().argmax(1)
        slot = torch.where(known, last, self.following[head, indices]).unsqueeze(1)
        dropped = weights.gather(1, slot).masked_fill(known.unsqueeze(1), 0.0)
        share = epoch_share(epoch, self.averaging_epoch)
        # Weights of equal worth are common, and their last bits say which of them goes next: in this order, as the
        # authors' code has it.
        kept = weights.scatter_add(1, slot, -dropped) * ((1 - share) / (1 - dropped))
        weights = kept.scatter_add(1, slot, torch.full_like(dropped, share))
        self.labels[head, indices] = labels.scatter(1, slot, new.unsqueeze(1))
        self.weights[head, indices] = weights
        self.following[head, indices] = weights.argmin(1)


def epoch_share(epoch: int, averaging_epoch: int) -> float:
    """What an epoch weighs in the average: 1 up to the first averaged one, then 1/2, 1/3, ..."""
    return 1 / (max(0, epoch - averaging_epoch) + 1)


class CoKe(ClusteringMethod):
    """CoKe with one, two or, if the third and later ones are small crops, more views.

    `head_multiples` are the heads' cluster numbers in multiples of `num_clusters`. `predictor_weight` is the share of
    the predictor's loss, 0: there is none; `small_crops_weight` that of the small crops' (three or more views).
    `averaging_epochs` last epochs average labels, in `num_slots` slots read at `label_temperature`, and centroids.
    """

    clusters_in_batch: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_images: int,
        num_clusters: int,
        head_multiples: Sequence[int],
        embedding_size: int,
        hidden_size: int,
        projector_layers: Literal[2, 3],
        predictor_weight: float,
        small_crops_weight: float,
        temperature: float,
        label_weight: float,
        dual_step: float,
        min_share: float,
        epochs: int,
        averaging_epochs: int,
        num_slots: int,
        label_temperature: float,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
        e_step_every_n_epochs: int,
    ) -> None:
        super().__init__(
            backbone=backbone,
            num_clusters=num_clusters,
            optimizer=optimizer,
            schedule=schedule,
            e_step_every_n_epochs=e_step_every_n_epochs,
        )
        project = mlp if projector_layers == 2 else deep_mlp
        self.projector = project(backbone.num_features, hidden_size, embedding_size)  # type: ignore[arg-type]
        self.predictor = mlp(embedding_size, hidden_size, embedding_size) if predictor_weight else None
        self.head_multiples = list(head_multiples)
        self.heads = nn.ModuleList()
        for size in (num_clusters * multiple for multiple in head_multiples):
            balance = SizeBalance(num_clusters=size, step=dual_step, min_share=min_share)
            self.heads.append(CentroidHead(num_features=embedding_size, balance=balance))
        self.register_buffer("clusters_in_batch", torch.zeros((), dtype=torch.int64), persistent=False)
        self.averaging_epoch = epochs - averaging_epochs
        self.memory = LabelMemory(
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

    def each_head(self) -> list[CentroidHead]:
        return list(self.heads)  # type: ignore[arg-type]

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        if batch.extra:
            raise InputError(
                "the data set has extra images, and CoKe remembers a cluster of every image it learns from",
                expected="every image among those to be clustered",
                do="set dataset.source.extra=[]",
            )
        projections = [self.projector(self.backbone(view)) for view in batch.views]
        predictions = [self.predictor(rows) for rows in projections] if self.predictor else None
        rows = self.objective(
            torch.stack(projections), torch.stack(predictions) if predictions else None, batch.indices
        )
        # The mean over the global batch, of which this process may hold more or less than its even share.
        return {"classification": rows.sum() * distributed.world_size() / batch.draws.total}

    @replayable(by=lambda self: self.current_epoch == 0, when=lambda self: self.current_epoch < self.averaging_epoch)
    @full_precision
    def objective(self, projections: Tensor, predictions: Tensor | None, indices: Tensor) -> Tensor:
        """Loss of each row (N,), mean over heads; clusters the batch.

        projections and predictions (V, N, D), of any length: one or two large views, then small ones.
        """
        projections = F.normalize(projections, dim=2)
        labels = self.cluster(projections[:2].detach().mean(0), indices)
        outputs = [(1 - self.predictor_weight, projections)]
        if predictions is not None:
            outputs.append((self.predictor_weight, F.normalize(predictions, dim=2)))
        losses = []
        for head, known in zip(self.each_head(), labels, strict=True):
            targets = known.unsqueeze(0)
            if len(projections) > 1:
                said = projections[:2] @ head.frozen / self.temperature
                targets = mixed_targets(known, said, label_weight=self.label_weight)
            for weight, rows in outputs:
                logits = rows @ head.frozen / self.temperature
                loss = cross_entropies(logits[:2], targets).mean(0)
                if len(logits) > 2:
                    mean_target = targets.mean(0).expand(len(logits) - 2, -1, -1)
                    small = cross_entropies(logits[2:], mean_target).mean(0)
                    loss = torch.lerp(loss, small, self.small_crops_weight)
                losses.append(weight * loss)
        return torch.stack(losses).sum(0) / len(labels)

    @torch.no_grad()
    def cluster(self, features: Tensor, indices: Tensor) -> list[Tensor]:
        """Move all heads by the global batch; what its rows are to learn: targets (N, K) by head.

        features (N, D): means of the large views' unit projections, of any length. Targets are last epoch's labels;
        in the first epoch, and for an image not seen before, the new ones.
        """
        epoch, memory = self.current_epoch, self.memory
        averaging = epoch >= self.averaging_epoch
        all_features, all_indices = distributed.gather(features), distributed.gather(indices)
        targets = []
        for number, head in enumerate(self.each_head()):
            place = (number, indices, len(head.balance.counts))
            old = memory.read(*place, epoch=epoch, temperature=self.label_temperature)
            new = head.assign(all_features, averaging=averaging)
            head.update(all_features, new, averaging=averaging)
            memory.write(number, all_indices, new, epoch=epoch)
            now = memory.read(*place, epoch=epoch, temperature=self.label_temperature)
            targets.append(torch.where(old.isnan() | (epoch == 0), now, old))
            if number == 0:
                self.clusters_in_batch.copy_((sizes(new, head.balance.counts) > 0).sum())
        return targets

    # Epochs

    def on_train_epoch_end(self) -> None:
        counts = self.each_head()[0].balance.counts
        shares = counts / counts.sum()
        self.log_dict({"train/smallest_cluster": shares.min(), "train/largest_cluster": shares.max()})
        epoch, start = self.current_epoch, self.averaging_epoch
        for head in self.each_head():
            head.end_epoch(epoch_share(epoch, start), averaging=epoch >= start)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/clusters_in_batch", self.clusters_in_batch.float())

    # The clusters

    def encode(self, images: Tensor) -> Tensor:
        return F.normalize(self.projector(self.backbone(images)), dim=1)

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        if 1 not in self.head_multiples:
            return None
        head = self.each_head()[self.head_multiples.index(1)]
        return features @ F.normalize(head.running, dim=0) / self.temperature
