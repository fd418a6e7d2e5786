"""SeCu: stable cluster discrimination (Qian; ICCV 2023, arXiv 2311.14310).

Every image has a remembered cluster, renewed whenever it is seen: the nearest prototype under a balance rule, a
lower bound on cluster sizes or a pull to a uniform distribution. The *prototypes* learn to classify the renewed
labels, with a gradient through the logit of the label only: a cluster without members in the batch stands still, and
hard members pull more. The *network* learns, against last epoch's prototypes, last epoch's label mixed with what the
other view says. Several heads of different K share one embedding; the head whose K is `num_clusters` gives the
clusters. The network stands still in the first epoch (rate 0), in which labels and prototypes come to be; its
momentum and running statistics do not.

Differs from the authors' code in:
- several processes: losses are means over the global batch, also where its shares are uneven; no image is repeated to
  fill a batch, so counts stay true.
- frozen prototypes are saved, so that a run goes on in the middle of an epoch.
- an image that no earlier epoch has labelled (batches left out by drop_last) learns its new label.
- products of embeddings and prototypes, and losses, are float32 under reduced precision (theirs: float16).
- a replaced ResNet stem starts as torch starts it (theirs: He-normal).
Self-labelling, the second stage of the paper's final numbers, is not part of this file.

Logged: `train/representation` and `train/prototypes`, the two cross-entropies, each about the mean of log K over the
heads where nothing is known; `train/clusters_in_batch`, how many clusters of the first head a batch fell into (1:
collapse); `train/smallest_cluster` and `train/largest_cluster`, shares of the first head at the end of an epoch.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.balanced_assignment import Balance, EntropyBalance, SizeBalance, sizes
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.losses.discrimination import cross_entropies, mixed_targets
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.heads import deep_mlp, mlp
from deepclust.nn.one_hot import one_hot_mask
from deepclust.nn.schedules import Schedule


class PrototypeHead(nn.Module):
    """K prototypes, what they were at the start of the epoch, and the rule that balances their clusters."""

    frozen: Tensor
    balance: Balance

    def __init__(self, *, num_features: int, num_clusters: int, balance: nn.Module) -> None:
        super().__init__()
        start = F.normalize(torch.randn(num_features, num_clusters), dim=0)
        self.prototypes = nn.Parameter(start.clone())  # (D, K); their lengths are free
        self.register_buffer("frozen", start)  # (D, K), of unit length
        self.balance = balance  # type: ignore[assignment]

    def unit(self) -> Tensor:
        """The prototypes (D, K) at unit length."""
        return F.normalize(self.prototypes, dim=0)

    @torch.no_grad()
    def freeze(self) -> None:
        """Take the present prototypes for what the network is to learn from."""
        self.frozen.copy_(self.unit())


class SeCu(ClusteringMethod):
    """SeCu's first stage. `head_multiples` are the heads' cluster numbers in multiples of `num_clusters`.

    `predictor` and three projector layers are the ImageNet form; `prototype_lr` is absolute, like the optimiser's.
    """

    pseudo_labels: Tensor
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
        predictor: bool,
        temperature: float,
        prototype_temperature: float,
        label_weight: float,
        balance: Literal["size", "entropy"],
        dual_step: float,
        min_share: float,
        entropy_weight: float,
        prototype_lr: float,
        prototype_schedule: Schedule,
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
        self.predictor = mlp(embedding_size, hidden_size, embedding_size) if predictor else None
        self.head_multiples = list(head_multiples)
        self.heads = nn.ModuleList()
        for size in (num_clusters * multiple for multiple in head_multiples):
            rule: nn.Module = (
                SizeBalance(num_clusters=size, step=dual_step, min_share=min_share)
                if balance == "size"
                else EntropyBalance(num_clusters=size, weight=entropy_weight * num_images)
            )
            self.heads.append(PrototypeHead(num_features=embedding_size, num_clusters=size, balance=rule))
        self.temperature = temperature
        self.prototype_temperature = prototype_temperature
        self.label_weight = label_weight
        self.prototype_lr = prototype_lr
        self.prototype_schedule = prototype_schedule
        # (H, M): the cluster of every image in every head; -1 until it is seen
        self.register_buffer("pseudo_labels", torch.full((len(self.heads), num_images), -1))
        self.register_buffer("clusters_in_batch", torch.zeros((), dtype=torch.int64), persistent=False)

    def each_head(self) -> list[PrototypeHead]:
        return list(self.heads)  # type: ignore[arg-type]

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        if batch.extra:
            raise InputError(
                "the data set has extra images, and SeCu remembers a cluster of every image it learns from",
                expected="every image among those to be clustered",
                do="set dataset.source.extra=[]",
            )
        projections = [self.projector(self.backbone(view)) for view in batch.views]
        predictions = [self.predictor(rows) for rows in projections] if self.predictor else []
        # The mean over the global batch, of which this process may hold more or less than its even share.
        mean = distributed.world_size() / batch.draws.total
        representation, prototypes = self.objective(torch.stack(projections + predictions), batch.indices)
        return {"representation": mean * representation.sum(), "prototypes": mean * prototypes.sum()}

    @replayable(by=lambda self: self.current_epoch == 0)
    @full_precision
    def objective(self, outputs: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Both losses of each row (N,), means over heads and outputs (O, N, D); renews labels and balance.

        Outputs, of any length, are the projections of two views and then, where there is a predictor, their
        predictions.
        """
        rows = F.normalize(outputs, dim=2)
        similarities = [rows.detach() @ head.unit() for head in self.each_head()]  # (O, N, K) each
        old, new = self.renew_labels([s.detach().mean(0) for s in similarities], indices)
        learnt = torch.where(old < 0, new, old)  # old: last epoch's
        representation, prototypes = [], []
        for head, similarity, target, label in zip(self.each_head(), similarities, learnt, new, strict=True):
            prototypes.append(stable_cross_entropies(similarity / self.prototype_temperature, label).mean(0))
            logits = rows @ head.frozen / self.temperature
            known = one_hot_mask(target, logits.shape[2]).to(logits.dtype)
            targets = mixed_targets(known, logits[:2], label_weight=self.label_weight)
            repeated = targets.repeat(len(logits) // 2, 1, 1)  # predictions learn what projections learn
            representation.append(cross_entropies(logits, repeated).mean(0))
        return torch.stack(representation).mean(0), torch.stack(prototypes).mean(0)

    @torch.no_grad()
    def renew_labels(self, similarities: list[Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
        """Last epoch's labels (H, N) of the images `indices`, -1 where there is none, and new ones by each head.

        Each process assigns its rows by the state before the batch; memory and balance then move by the global batch.
        """
        first = self.current_epoch == 0
        old = self.pseudo_labels[:, indices]
        pairs = list(zip(self.each_head(), similarities, old, strict=True))
        new = torch.stack([head.balance.assign(s, None if first else before) for head, s, before in pairs])
        self.remember(distributed.gather(indices), distributed.gather(new.T).T)
        return torch.full_like(old, -1) if first else old, new

    @torch.no_grad()
    def remember(self, indices: Tensor, labels: Tensor) -> None:
        """Put the `labels` (H, N) of the global batch's images `indices` (N,) into balance and memory."""
        first = self.current_epoch == 0
        for head, given, before in zip(self.each_head(), labels, self.pseudo_labels[:, indices], strict=True):
            head.balance.update(given, None if first else before)
        self.pseudo_labels[:, indices] = labels
        self.clusters_in_batch.copy_((sizes(labels[0], self.each_head()[0].balance.counts) > 0).sum())

    # Epochs

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        for head in self.each_head():
            head.freeze()

    def on_train_epoch_end(self) -> None:
        head = self.each_head()[0]
        seen = self.pseudo_labels[0][self.pseudo_labels[0] >= 0]
        shares = sizes(seen, head.balance.counts) / len(seen)
        self.log_dict({"train/smallest_cluster": shares.min(), "train/largest_cluster": shares.max()})
        for head in self.each_head():
            head.balance.end_epoch()

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
        return features @ head.unit() / self.temperature

    # The optimiser

    def parameter_groups(self) -> list[dict[str, Any]]:
        prototypes = [head.prototypes for head in self.each_head()]
        taken = {id(p) for p in prototypes}
        return [
            {"params": [p for p in self.parameters() if p.requires_grad and id(p) not in taken]},
            {"params": prototypes, "lr": self.prototype_lr, "schedule": self.prototype_schedule},
        ]


def stable_cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each row (O, N) of logits (O, N, K) and labels (N,); gradient to the labels' logits only."""
    own = one_hot_mask(labels, logits.shape[2])
    rows = torch.where(own, logits, logits.detach()).flatten(0, 1)
    return F.cross_entropy(rows, labels.repeat(len(logits)), reduction="none").unflatten(0, logits.shape[:2])
