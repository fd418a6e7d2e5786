"""SCAN: semantic clustering by adopting nearest neighbours (Van Gansbeke et al.; ECCV 2020, arXiv 2005.12320).

Three stages, each a run of its own. A *pretext* task (`Pretext`, SimCLR) learns features whose nearest neighbours
mostly show the same thing. *Clustering* (`SCAN`) mines those neighbours once and trains the network with a linear
cluster head so that an image and a neighbour fall into the same cluster with certainty, while the entropy of the mean
assignment keeps the clusters in use. Several heads may be trained; a loss that needs no labels says which one gives
the clusters. *Self-labelling*, the third stage, is a method of its own, since it improves other clusterings too.

Differs from the authors' code in:
- the last epoch is the result; theirs is the epoch and head of the lowest selection loss. The head is chosen as there.
- the selection loss is taken on the images trained on and their mined neighbours; theirs on the test images, with five
  neighbours among themselves.
- several processes: the mean assignment is that of the global batch, with gradient; theirs is each device's own.
- agreement is float32 and at most 1 under reduced precision.

Logged: `train/contrast`, the pretext task's loss, log (2N - 1) where nothing is known. `train/consistency`, minus the
log of the agreement with neighbours (0 is best), and `train/entropy`, minus the weighted entropy of the mean assignment
(-weight log K is best), both summed over the heads; `select/val_scan_loss`, the selection loss of the chosen head as
the epoch begins.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.neighbors import nearest_neighbors
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule

SMALLEST_SHARE = 1e-8  # what the entropy takes for the share of an empty cluster
PAIRS_AT_A_TIME = 2**24  # numbers of neighbours' assignments held at once


# First stage ----------------------------------------------------------------------------------------------------------


class Pretext(ClusteringMethod):
    """SCAN's first stage: SimCLR in one direction. It has no clusters of its own."""

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: int,
        embedding_size: int,
        temperature: float,
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
        self.projector = projection_head(backbone.num_features, embedding_size)  # type: ignore[arg-type]
        self.temperature = temperature

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        # Both views at once, so that batch statistics are those of all 2N pictures.
        return {"contrast": self.objective(self.projector(self.backbone(torch.cat(batch.views))))}

    @replayable()
    def objective(self, projections: Tensor) -> Tensor:
        """The contrast of raw projections (2N, D) of both views."""
        rows = F.normalize(projections, dim=1)
        anchors, others = (distributed.gather_with_gradient(view) for view in rows.chunk(2))
        return pretext_loss(anchors, others, temperature=self.temperature)


def projection_head(in_features: int, out_features: int) -> nn.Sequential:
    """Linear, ReLU, Linear, as wide inside as its input."""
    return nn.Sequential(nn.Linear(in_features, in_features), nn.ReLU(), nn.Linear(in_features, out_features))


@full_precision
def pretext_loss(anchors: Tensor, others: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE of unit rows `anchors` (N, D), each against its row of `others` (N, D); a scalar, 0 for one row.

    -1/N sum_i log( exp(a_i . b_i / t) / sum_r exp(a_i . r / t) ), where r runs over the 2N - 1 rows of both views that
    are not a_i itself. Rows of the second view are never anchors.
    """
    logits = anchors @ torch.cat([anchors, others]).T / temperature
    positions = torch.arange(len(anchors), device=anchors.device)
    itself = logits.new_full((), -torch.inf)  # filled there: a number that is brought to a device would be waited for
    logits = logits.index_put((positions, positions), itself)
    return F.cross_entropy(logits, positions + len(anchors))


# Second stage ---------------------------------------------------------------------------------------------------------


class SCAN(ClusteringMethod):
    """SCAN's second stage: `num_heads` cluster heads on the backbone of an earlier run, whose neighbours teach them.

    Neighbours are mined on the earlier run's projection (`projector`, of `embedding_size`) or on the backbone. Without
    `train_backbone` the heads alone are trained, on a backbone in evaluation mode.
    """

    neighbors: Tensor
    best_head: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_images: int,
        num_clusters: int,
        num_heads: int,
        num_neighbors: int,
        mine_on: Literal["projection", "backbone"],
        embedding_size: int,
        train_backbone: bool,
        entropy_weight: float,
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
        width: int = backbone.num_features  # type: ignore[assignment]
        self.heads = nn.ModuleList(nn.Linear(width, num_clusters) for _ in range(num_heads))
        self.projector = projection_head(width, embedding_size) if mine_on == "projection" else None
        if self.projector is not None:
            self.projector.requires_grad_(False)
        self.num_neighbors = num_neighbors
        self.train_backbone = train_backbone
        self.entropy_weight = entropy_weight
        self.has_start = False
        # (M, 1 + num_neighbors): the image itself, then its neighbours, nearest first; -1 until they are mined
        self.register_buffer("neighbors", torch.full((num_images, 1 + num_neighbors), -1))
        self.register_buffer("best_head", torch.zeros((), dtype=torch.int64))
        self.table = self.neighbors  # on the CPU
        backbone.requires_grad_(train_backbone)
        self.train()

    def train(self, mode: bool = True) -> "SCAN":
        super().train(mode)
        if not self.train_backbone:
            self.backbone.eval()
        return self

    # Neighbours

    def start_from(self, earlier: ClusteringMethod) -> None:
        super().start_from(earlier)
        if self.projector is not None:
            theirs = getattr(earlier, "projector", None)
            if not isinstance(theirs, nn.Module):
                raise InputError(
                    f"the earlier run is of {type(earlier).__name__}, which has no projector to mine neighbours on",
                    expected="a run of method=scan_pretext, or neighbours by the backbone",
                    do="set method.mine_on=backbone",
                )
            self.take_over(self.projector, theirs)
        self.has_start = True

    def on_train_start(self) -> None:
        if bool((self.neighbors < 0).any()):
            if not self.has_start:
                raise InputError(
                    "SCAN mines neighbours on what an earlier run has learned, and start and before are null",
                    expected="a finished run of method=scan_pretext or of another method with the same backbone",
                    do="set start=DIR",
                )
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
            features = self.encode_all(datamodule.clean_batches(datamodule.fit, self.device), len(datamodule.fit))
            self.neighbors.copy_(self.mine(features))
        self.table = self.neighbors.cpu()

    @torch.no_grad()
    def mine(self, features: Tensor) -> Tensor:
        """Every image and its nearest others (M, 1 + k) by cosine, from its features (M, D)."""
        if self.projector is not None:
            features = torch.cat([self.projector(rows.to(self.weight_dtype)) for rows in features.split(65536)])
        rows = F.normalize(features, dim=1)
        rank, processes = distributed.rank(), distributed.world_size()
        first, stop = (len(rows) * r // processes for r in (rank, rank + 1))  # each process searches for its share
        own = torch.arange(first, stop, device=rows.device)
        found = nearest_neighbors(rows[first:stop], rows, self.num_neighbors, metric="inner_product", exclude=own)[1]
        return distributed.gather(torch.cat([own[:, None], found], 1))

    def companions(self, indices: Tensor, draws: Draws) -> Tensor:
        """One of the image itself and its neighbours, all equally likely."""
        columns = torch.randint(self.table.shape[1], (len(indices),), generator=draws.generator("companions"))
        return self.table[indices, columns][:, None]

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        if batch.extra:
            raise InputError(
                "the data set has extra images, and SCAN mines neighbours among the images to be clustered only",
                expected="every image among those to be clustered",
                do="set dataset.source.extra=[]",
            )
        # One after the other, so that batch statistics are a view's.
        return self.objective(*(self.backbone(images) for images in (batch.views[0], batch.companion_views[0])))

    @replayable()
    def objective(self, anchors: Tensor, neighbors: Tensor) -> dict[str, Tensor]:
        """The weighted terms, of the features (N, D) of images and of a neighbour of each."""
        consistency, entropies = scan_losses(self.all_logits(anchors), self.all_logits(neighbors))
        return {"consistency": consistency.sum(), "entropy": -self.entropy_weight * entropies.sum()}

    def all_logits(self, features: Tensor) -> Tensor:
        """Logits (H, N, K) of every head for the images of the global batch, from this process's features (n, D)."""
        logits = torch.stack([head(features) for head in self.heads], 1)
        return distributed.gather_with_gradient(logits).transpose(0, 1)

    # The clusters

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.e_step_every_n_epochs and self.current_epoch % self.e_step_every_n_epochs == 0:
            self.log("select/val_scan_loss", self.selection_loss)

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Choose the head whose clusters agree best with the neighbours."""
        features = features.to(self.weight_dtype)
        consistency, entropies = selection_losses((head(features).softmax(1) for head in self.heads), self.neighbors)
        losses = consistency - entropies
        self.best_head.copy_(losses.argmin())
        self.selection_loss = losses.amin()

    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.heads[int(self.best_head)](features)


@full_precision
def scan_losses(anchors: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """What lacks to agreement with the neighbours, and the entropy of the anchors' mean assignment; each (...).

    Of logits (..., N, K) of images and of one neighbour each; SCAN, equation 2. A head minimises the first minus a
    weight times the second.
    """
    p, q = anchors.softmax(-1), neighbors.softmax(-1)
    return disagreements(p, q).mean(-1), entropy(p.mean(-2))


def disagreements(p: Tensor, q: Tensor) -> Tensor:
    """-log <p, q> (...) of assignments (..., K), at most 100."""
    agreement = (p * q).sum(-1).clamp(max=1)
    return F.binary_cross_entropy(agreement, torch.ones_like(agreement), reduction="none")


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy (...) of distributions (..., K) whose entries are taken for SMALLEST_SHARE at least."""
    shares = probabilities.clamp(min=SMALLEST_SHARE)
    return -(shares * shares.log()).sum(-1)


@full_precision
def selection_losses(probabilities: Iterable[Tensor], neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """Disagreement with all listed neighbours and entropy of each head; (H,) each, the lower their difference the
    better.

    From the assignments (M, K) of each head and the table of neighbours (M, 1 + k).
    """
    consistency, entropies = [], []
    for p in probabilities:
        rows = max(1, PAIRS_AT_A_TIME // (neighbors.shape[1] * p.shape[1]))
        pairs = zip(p.split(rows), neighbors.split(rows), strict=True)
        total = torch.stack([disagreements(some[:, None], p[beside]).double().sum() for some, beside in pairs]).sum()
        consistency.append((total / neighbors.numel()).to(p.dtype))
        entropies.append(entropy(p.mean(0)))
    return torch.stack(consistency), torch.stack(entropies)
