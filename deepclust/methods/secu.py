"""SeCu: stable cluster discrimination (Qian; ICCV 2023, arXiv 2311.14310).

Every image has a remembered pseudo-label. Whenever the image is seen, it gets a new one: the nearest prototype under a
balance constraint, which is either a lower bound on cluster sizes or a pull to a uniform distribution. The *prototypes*
learn to classify the new pseudo-labels, with a gradient through the logit of the label only. A cluster without members
in the batch therefore does not move, and members that are hard to classify pull more. The *network* learns to predict
the pseudo-label of the previous epoch, mixed with the prediction for the other view, using the prototypes as they stood
when the epoch began (the frozen prototypes).

Several heads with different K share one embedding. The head whose K is `num_clusters` gives the final clustering. The
network does not move in the first epoch (its learning rate is 0), which only creates pseudo-labels and prototypes. Its
momentum and running statistics do change. Self-labelling, which the paper's final numbers include, is
`deepclust.methods.self_label`.

Differs from the authors' code in:
- Several processes. Losses are means over the global batch, even if the processes hold unequal parts of it. No image is
  repeated to fill a batch, so that counts stay exact.
- Checkpoints. They hold the frozen prototypes, so that a run can be resumed in the middle of an epoch.
- Images without an earlier pseudo-label (`drop_last` leaves some out). They learn their new one.
- Precision. Products of embeddings and prototypes, and losses, are float32 under mixed precision (theirs: float16).
- Initialisation. A ResNet stem that replaces torchvision's is initialised as torch does it (theirs: He-normal,
  about half as large).

Logged:
- `train/representation`, `train/prototypes`: the cross-entropies of network and prototypes. For a network that knows
  nothing each is about the mean of log K over the heads.
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
from deepclust.clustering.balanced_assignment import BalanceConstraint, EntropyConstraint, SizeConstraint, cluster_sizes
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.losses.discrimination import cross_entropy_per_row, mix_with_other_view
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.heads import three_layer_mlp, two_layer_mlp
from deepclust.nn.one_hot import one_hot_mask
from deepclust.nn.schedules import Schedule
from deepclust.number_types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class PrototypeHead(nn.Module):
    """The K prototypes of one head, their copy from the start of the epoch, and the constraint on their clusters.

    `prototypes` (D, K) are trained, and their lengths are free. `frozen` (D, K) holds them at unit length.
    """

    frozen: Tensor
    balance: BalanceConstraint

    def __init__(self, *, num_features: int, num_clusters: int, balance: nn.Module) -> None:
        super().__init__()
        start = F.normalize(torch.randn(num_features, num_clusters), dim=0)
        self.prototypes = nn.Parameter(start.clone())
        self.register_buffer("frozen", start)
        self.balance = balance  # type: ignore[assignment]

    def unit_prototypes(self) -> Tensor:
        """Return the prototypes (D, K) at unit length."""
        return F.normalize(self.prototypes, dim=0)

    @torch.no_grad()
    def update_frozen(self) -> None:
        """Copy the current prototypes into `frozen`, from which the network learns."""
        self.frozen.copy_(self.unit_prototypes())


class SeCu(ClusteringMethod):
    """SeCu without self-labelling.

    The arguments not listed here are those of `ClusteringMethod`. Symbols are those of the paper and its code.

    Args of the networks:
        embedding_size: size D of the embedding that all heads share.
        hidden_size: width of the hidden layers of projector and predictor.
        projector_layers: linear layers of the projector: 2, or 3 with batch normalisation at the end (ImageNet).
        predictor: whether a predictor follows the projector (ImageNet).

    Args of the objective:
        temperature: temperature t_x of the loss of the network.
        prototype_temperature: temperature t_w of the loss of the prototypes.
        label_weight: weight tau of the pseudo-label in the target of the network; the rest is the other view's.

    Args of the assignment:
        num_images: number M of images that are clustered; each has a remembered pseudo-label.
        head_multiples: number of clusters of each head, in multiples of `num_clusters`.
        balance: the constraint: "size", a lower bound on cluster sizes, or "entropy", a pull to equal sizes.
        dual_step: step size eta of the dual variables (size constraint).
        min_share: lower bound gamma on a cluster's size, as a share of M / K (size constraint). 1 asks for equal sizes.
        entropy_weight: weight of the entropy for each image, alpha / M (entropy constraint).

    Args of the optimisation:
        prototype_lr: learning rate of the prototypes. It is absolute and no multiple of the network's.
        prototype_schedule: the schedule of that learning rate.
    """

    num_views = 2

    pseudo_labels: Tensor
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
        predictor: bool,
        temperature: PositiveFloat,
        prototype_temperature: PositiveFloat,
        label_weight: Fraction,
        balance: Literal["size", "entropy"],
        dual_step: NonNegativeFloat,
        min_share: Fraction,
        entropy_weight: NonNegativeFloat,
        prototype_lr: NonNegativeFloat,
        prototype_schedule: Schedule,
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
        self.predictor = two_layer_mlp(embedding_size, hidden_size, embedding_size) if predictor else None
        self.head_multiples = list(head_multiples)
        self.heads = nn.ModuleList()
        for k in (num_clusters * multiple for multiple in head_multiples):
            balance_constraint: nn.Module = (
                SizeConstraint(num_clusters=k, step=dual_step, min_share=min_share)
                if balance == "size"
                else EntropyConstraint(num_clusters=k, weight=entropy_weight * num_images)
            )
            self.heads.append(PrototypeHead(num_features=embedding_size, num_clusters=k, balance=balance_constraint))
        self.temperature = temperature
        self.prototype_temperature = prototype_temperature
        self.label_weight = label_weight
        self.prototype_lr = prototype_lr
        self.prototype_schedule = prototype_schedule
        # (H, M), of every image in every head; -1 until the image is seen
        self.register_buffer("pseudo_labels", torch.full((len(self.heads), num_images), -1))
        self.register_buffer("clusters_in_batch", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def prototype_heads(self) -> list[PrototypeHead]:
        """The heads, with their type."""
        return list(self.heads)  # type: ignore[arg-type]

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        if batch.extra:
            raise InputError(
                "the data set has extra images, and SeCu remembers a cluster of every image it learns from",
                expected="only images that are clustered",
                do="set dataset.source.extra=[]",
            )
        projections = [self.projector(self.backbone(view)) for view in batch.views]
        predictions = [self.predictor(x) for x in projections] if self.predictor else []
        representation, prototypes = self.compute_terms_and_update_pseudo_labels(
            torch.stack(projections + predictions), batch.indices
        )
        # The mean over the global batch. DDP averages over processes, whose parts of it may differ in size.
        scale = distributed.world_size() / batch.draws.global_batch_size
        return {"representation": scale * representation.sum(), "prototypes": scale * prototypes.sum()}

    @replayable(constants=lambda self: self.current_epoch == 0)
    @full_precision
    def compute_terms_and_update_pseudo_labels(self, outputs: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Assign the images `indices` (N,) anew; return both losses of each image (N,), means over heads and outputs.

        outputs (O, N, D) are not normalised. They are the projections of two views, followed by the predictions if
        there is a predictor. The assignment changes pseudo-labels, balance constraints and `clusters_in_batch`.
        """
        z = F.normalize(outputs, dim=2)
        similarities = [z.detach() @ head.unit_prototypes() for head in self.prototype_heads]  # (O, N, K) each
        old, new = self.update_pseudo_labels([s.detach().mean(0) for s in similarities], indices)
        labels = torch.where(old < 0, new, old)  # for the network: those of the previous epoch
        representation, prototypes = [], []
        for head, similarity, label, new_label in zip(self.prototype_heads, similarities, labels, new, strict=True):
            prototypes.append(stable_cross_entropies(similarity / self.prototype_temperature, new_label).mean(0))
            logits = z @ head.frozen / self.temperature
            one_hot = one_hot_mask(label, logits.shape[2]).to(logits.dtype)
            targets = mix_with_other_view(one_hot, logits[:2], label_weight=self.label_weight)
            repeated = targets.repeat(len(logits) // 2, 1, 1)  # predictions have the targets of the projections
            representation.append(cross_entropy_per_row(logits, repeated).mean(0))
        return torch.stack(representation).mean(0), torch.stack(prototypes).mean(0)

    @torch.no_grad()
    def update_pseudo_labels(self, similarities: list[Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
        """Assign and remember the images `indices` (N,); return their old and their new pseudo-labels, both (H, N).

        similarities (N, K) are those of each head. Old pseudo-labels are -1 in the first epoch and for images that have
        none. Each process assigns its images by the state before the batch. Then the pseudo-labels of the global batch
        are stored and update the balance constraints.
        """
        is_first_epoch = self.current_epoch == 0
        old = self.pseudo_labels[:, indices]
        new = torch.stack(
            [
                head.balance.assign(similarity, None if is_first_epoch else old_label)
                for head, similarity, old_label in zip(self.prototype_heads, similarities, old, strict=True)
            ]
        )
        self.store_pseudo_labels_and_update_balance(distributed.all_gather(indices), distributed.all_gather(new.T).T)
        return torch.full_like(old, -1) if is_first_epoch else old, new

    @torch.no_grad()
    def store_pseudo_labels_and_update_balance(self, indices: Tensor, pseudo_labels: Tensor) -> None:
        """Store pseudo-labels (H, N) of the images `indices` (N,) of the global batch; update the constraints."""
        is_first_epoch = self.current_epoch == 0
        for head, new, old in zip(self.prototype_heads, pseudo_labels, self.pseudo_labels[:, indices], strict=True):
            head.balance.update(new, None if is_first_epoch else old)
        self.pseudo_labels[:, indices] = pseudo_labels
        first_head = self.prototype_heads[0]
        self.clusters_in_batch.copy_((cluster_sizes(pseudo_labels[0], first_head.balance.counts) > 0).sum())

    # Epochs

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        for head in self.prototype_heads:
            head.update_frozen()

    def on_train_epoch_end(self) -> None:
        head = self.prototype_heads[0]
        seen = self.pseudo_labels[0][self.pseudo_labels[0] >= 0]
        shares = cluster_sizes(seen, head.balance.counts) / len(seen)
        self.log_dict({"train/smallest_cluster": shares.min(), "train/largest_cluster": shares.max()})
        for head in self.prototype_heads:
            head.balance.end_epoch()

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/clusters_in_batch", self.clusters_in_batch.float())

    # The final clustering

    def encode(self, images: Tensor) -> Tensor:
        return F.normalize(self.projector(self.backbone(images)), dim=1)

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        if 1 not in self.head_multiples:
            return None
        head = self.prototype_heads[self.head_multiples.index(1)]
        return features @ head.unit_prototypes() / self.temperature

    # The optimiser

    def parameter_groups(self) -> list[dict[str, Any]]:
        prototypes = [head.prototypes for head in self.prototype_heads]
        prototype_ids = {id(p) for p in prototypes}
        return [
            {"params": [p for p in self.parameters() if p.requires_grad and id(p) not in prototype_ids]},
            {"params": prototypes, "lr": self.prototype_lr, "schedule": self.prototype_schedule},
        ]


def stable_cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropies (O, N) of logits (O, N, K) and pseudo-labels (N,).

    The gradient reaches the logits of the labels only.
    """
    is_label = one_hot_mask(labels, logits.shape[2])
    rows = torch.where(is_label, logits, logits.detach()).flatten(0, 1)
    return F.cross_entropy(rows, labels.repeat(len(logits)), reduction="none").unflatten(0, logits.shape[:2])
