"""SCAN: semantic clustering by adopting nearest neighbours (Van Gansbeke et al.; ECCV 2020, arXiv 2005.12320).

SCAN has three stages, and each is a run of its own. The *pretext* stage (`Pretext`, SimCLR) learns features whose
nearest neighbours mostly belong to the same class. The *clustering* stage (`SCAN`) finds ("mines") these neighbours
once. It trains the network and a linear cluster head so that an image and its neighbour get the same cluster with high
probability, while the entropy of the mean assignment keeps all clusters in use. Several heads can be trained, and a
loss that needs no ground truth selects the one that gives the final clustering. The third stage, *self-labelling*, is
`deepclust.methods.self_label`, because it improves the clusterings of other methods too.

Differs from the authors' code in:
- The result. It is that of the last epoch unless `select` asks for the epoch with the lowest selection loss, as theirs.
- The selection loss. It is computed on the training images and their mined neighbours, so that test images choose
  nothing. The authors compute it on the test images, each with its five nearest test images.
- Several processes. Batch statistics are those of a process (theirs: of a device, too); nothing else differs, since
  both take the mean assignment of the global batch.
- Cutout on small digits. Its sides can be odd (theirs are even, as they are here on the images that they use).
- Initialisation. A replaced ResNet stem starts as torch does it (theirs: He-normal, about half as large).
- Precision. The agreement is float32 and at most 1 under mixed precision.

Logged:
- `train/contrast`: the loss of the pretext stage. For a network that knows nothing it is log(2N - 1).
- `train/consistency`: minus the log of the agreement with the neighbours, summed over the heads. 0 is best.
- `train/entropy`: minus the weighted entropy of the mean assignment, summed over the heads. -weight log K per head is
  best.
- `select/val_scan_loss`: the selection loss of the selected head at the start of the epoch.
- `select/best_epoch`, where `select` asks for it: after how many epochs that loss has been lowest so far.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.neighbors import draw_one_neighbor, mine_neighbors
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.best_networks import BestNetworks
from deepclust.nn.schedules import Schedule
from deepclust.number_types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

log = logging.getLogger(__name__)
SMALLEST_SHARE = 1e-8  # the share at which the entropy clamps those of empty clusters
MAX_ELEMENTS_PER_CHUNK = 2**24  # of the probabilities of neighbours that the selection loss gathers at once


# First stage ----------------------------------------------------------------------------------------------------------


class Pretext(ClusteringMethod):
    """SCAN's first stage: SimCLR in one direction. It has no clustering of its own; k-means evaluates its features.

    The arguments not listed here are those of `ClusteringMethod`.

    Args:
        embedding_size: size of the output of the projector.
        temperature: temperature t of the contrast.
    """

    num_views = 2

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_clusters: PositiveInt,
        embedding_size: PositiveInt,
        temperature: PositiveFloat,
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
        self.projector = make_projector(backbone.num_features, embedding_size)  # type: ignore[arg-type]
        self.temperature = temperature

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        # Both views in one pass, so that batch statistics are those of all 2N images.
        return self.compute_terms(self.projector(self.backbone(torch.cat(batch.views))))

    @replayable()
    def compute_terms(self, projections: Tensor) -> dict[str, Tensor]:
        """Return the loss of the projections (2N, D) of both views, which are not normalised."""
        embeddings = F.normalize(projections, dim=1)
        anchors, others = (distributed.all_gather_with_gradient(view) for view in embeddings.chunk(2))
        return {"contrast": pretext_loss(anchors, others, temperature=self.temperature)}


def make_projector(in_features: int, out_features: int) -> nn.Sequential:
    """Return Linear, ReLU, Linear; the hidden layer is as wide as the input."""
    return nn.Sequential(nn.Linear(in_features, in_features), nn.ReLU(), nn.Linear(in_features, out_features))


@full_precision
def pretext_loss(anchors: Tensor, others: Tensor, *, temperature: float) -> Tensor:
    """Return the InfoNCE loss, a scalar, of the unit embeddings `anchors` and `others` (N, D) of two views.

    -1/N sum_i log( exp(a_i . b_i / t) / sum_r exp(a_i . r / t) ), where r runs over the 2N - 1 embeddings of both views
    other than a_i. Embeddings of the second view are never anchors. For N = 1 the loss is 0.
    """
    logits = anchors @ torch.cat([anchors, others]).T / temperature
    positions = torch.arange(len(anchors), device=anchors.device)
    minus_infinity = logits.new_full((), -torch.inf)  # made on the device; a copy from the host would wait for it
    logits = logits.index_put((positions, positions), minus_infinity)
    return F.cross_entropy(logits, positions + len(anchors))


# Second stage ---------------------------------------------------------------------------------------------------------


class SCAN(ClusteringMethod):
    """SCAN's second stage, on the backbone of an earlier run.

    The arguments not listed here are those of `ClusteringMethod`. The E-step selects the head.

    Args of the networks:
        num_heads: number H of cluster heads; the best one is selected.
        train_backbone: whether the backbone is trained. Otherwise it stays in evaluation mode (ImageNet).

    Args of the neighbours:
        num_images: number M of images that are clustered; each has a row in the table of neighbours.
        num_neighbors: number of neighbours that are mined for an image.
        mine_on: the features whose neighbours are mined, the earlier run's "projection" or its "backbone".
        embedding_size: size of that projection, as in the earlier run.

    Args of the objective and of the result:
        entropy_weight: weight lambda of the entropy (equation 2).
        select: the epoch whose networks give the result: `last_epoch`, or among those before an E-step the one with
            the `lowest_selection_loss`, which needs no labels. Memory and checkpoints hold its networks, too.

    Raises:
        InputError: if the epoch is to be selected, and there is no E-step.
    """

    neighbors: Tensor
    best_head: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_images: PositiveInt,
        num_clusters: PositiveInt,
        num_heads: PositiveInt,
        num_neighbors: PositiveInt,
        mine_on: Literal["projection", "backbone"],
        embedding_size: PositiveInt,
        train_backbone: bool,
        entropy_weight: NonNegativeFloat,
        select: Literal["last_epoch", "lowest_selection_loss"],
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
        width: int = backbone.num_features  # type: ignore[assignment]
        self.heads = nn.ModuleList(nn.Linear(width, num_clusters) for _ in range(num_heads))
        self.projector = make_projector(width, embedding_size) if mine_on == "projection" else None
        if self.projector is not None:
            self.projector.requires_grad_(False)
        self.num_neighbors = num_neighbors
        self.train_backbone = train_backbone
        self.entropy_weight = entropy_weight
        # (M, 1 + num_neighbors): each image and then its neighbours, nearest first; -1 until they are mined
        self.register_buffer("neighbors", torch.full((num_images, 1 + num_neighbors), -1))
        self.register_buffer("best_head", torch.zeros((), dtype=torch.int64))
        self.neighbors_on_cpu = self.neighbors
        backbone.requires_grad_(train_backbone)
        chooses_epoch = select == "lowest_selection_loss"
        if chooses_epoch and not e_step_every_n_epochs:
            raise InputError(
                "method.select is lowest_selection_loss, and there is no E-step, which computes that loss",
                expected="method.e_step_every_n_epochs of 1 or more",
                do="set method.e_step_every_n_epochs=1, or method.select=last_epoch",
            )
        self.best = BestNetworks(self.trained_networks()) if chooses_epoch else None
        self.train()

    def trained_networks(self) -> dict[str, nn.Module]:
        """Return the networks that training changes, by name."""
        return {"heads": self.heads, **({"backbone": self.backbone} if self.train_backbone else {})}

    def train(self, mode: bool = True) -> "SCAN":
        super().train(mode)
        if not self.train_backbone:
            self.backbone.eval()
        return self

    # Neighbours

    def start_from(self, earlier: ClusteringMethod) -> None:
        super().start_from(earlier)
        if self.projector is not None:
            earlier_projector = getattr(earlier, "projector", None)
            if not isinstance(earlier_projector, nn.Module):
                raise InputError(
                    f"the earlier run is of {type(earlier).__name__}, which has no projector to mine neighbours on",
                    expected="a run of method=scan_pretext, or neighbours mined on the backbone",
                    do="set method.mine_on=backbone",
                )
            self.load_weights(self.projector, earlier_projector)

    def on_train_start(self) -> None:
        if bool((self.neighbors < 0).any()):
            # The features of a backbone without weights, such as that of dataset=features, come from no earlier run.
            has_weights = self.projector is not None or any(True for _ in self.backbone.parameters())
            if has_weights:
                self.require_earlier_run("SCAN mines neighbours on the features", stage="scan_pretext")
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
            features = self.encode_all(datamodule.clean_batches(datamodule.fit, self.device), len(datamodule.fit))
            self.neighbors.copy_(self.mine_neighbors(features))
        self.neighbors_on_cpu = self.neighbors.cpu()

    @torch.no_grad()
    def mine_neighbors(self, features: Tensor) -> Tensor:
        """Return the indices (M, 1 + k) of each image and its k nearest others by cosine, from the features (M, D)."""
        if self.projector is not None:
            features = torch.cat([self.projector(rows.to(self.weight_dtype)) for rows in features.split(65536)])
        return mine_neighbors(features, self.num_neighbors)

    def companions(self, indices: Tensor, draws: Draws) -> Tensor:
        """Return one companion (N, 1) of each image: itself or one of its neighbours, with equal chances."""
        return draw_one_neighbor(self.neighbors_on_cpu[indices], draws.make_generator("companions"))

    # One step

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        batch.refuse_extra_images("and SCAN mines neighbours only among the images that are clustered")
        # Two passes, so that images and neighbours each have their own batch statistics.
        anchors, neighbors = (self.backbone(images) for images in (batch.views[0], batch.companion_views[0]))
        return self.compute_terms(anchors, neighbors)

    @replayable()
    def compute_terms(self, anchors: Tensor, neighbors: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the features (N, D) of images and of a neighbour of each."""
        consistency, entropies = scan_losses(self.gather_head_logits(anchors), self.gather_head_logits(neighbors))
        return {"consistency": consistency.sum(), "entropy": -self.entropy_weight * entropies.sum()}

    def gather_head_logits(self, features: Tensor) -> Tensor:
        """Return the logits (H, N, K) of all heads for the global batch, from the features (n, D) of this process."""
        logits = torch.stack([head(features) for head in self.heads], 1)
        return distributed.all_gather_with_gradient(logits).transpose(0, 1)

    # The final clustering

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.e_step_every_n_epochs and self.current_epoch % self.e_step_every_n_epochs == 0:
            self.log("select/val_scan_loss", self.selection_loss)
            if self.best is not None:
                self.log("select/best_epoch", self.best.epoch.float())

    def run_e_step(self, epoch: int) -> None:
        """Select the head and keep the best networks; the E-step after training brings them back."""
        super().run_e_step(epoch)
        if self.best is not None and epoch > 0:  # before the first epoch, the heads are untrained
            self.best.keep_if_best(self.trained_networks(), loss=self.selection_loss, epoch=epoch)
            if not self.trainer.training and self.best.epoch < epoch:
                self.best.restore(self.trained_networks())
                log.info("the result is that of epoch %d, whose selection loss is lowest", self.best.epoch)
                super().run_e_step(epoch)

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Select the head with the lowest selection loss."""
        features = features.to(self.weight_dtype)
        consistency, entropies = selection_losses((head(features).softmax(1) for head in self.heads), self.neighbors)
        losses = consistency - entropies
        self.best_head.copy_(losses.argmin())
        self.selection_loss = losses.amin()

    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.heads[int(self.best_head)](features)


@full_precision
def scan_losses(anchors: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the disagreement with the neighbours and the entropy of the anchors' mean assignment, each of shape (...).

    anchors and neighbors are logits (..., N, K) of images and of one neighbour each. A head minimises the first minus
    lambda times the second (SCAN, equation 2).
    """
    p, q = anchors.softmax(-1), neighbors.softmax(-1)
    return disagreements(p, q).mean(-1), entropy(p.mean(-2))


def disagreements(p: Tensor, q: Tensor) -> Tensor:
    """Return -log <p, q> (...) of probabilities p and q (..., K); at most 100, and nan where these are no numbers."""
    agreement = (p * q).sum(-1).clamp(max=1)
    is_nan = agreement.isnan()  # torch's function stops the program there, before the loss can be checked
    losses = F.binary_cross_entropy(agreement.masked_fill(is_nan, 1), torch.ones_like(agreement), reduction="none")
    return losses.masked_fill(is_nan, torch.nan)


def entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy (...) of distributions (..., K), whose entries are clamped to SMALLEST_SHARE from below."""
    shares = probabilities.clamp(min=SMALLEST_SHARE)
    return -(shares * shares.log()).sum(-1)


@full_precision
def selection_losses(probabilities: Iterable[Tensor], neighbors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean disagreement with all neighbours and the entropy of the mean assignment, both (H,).

    `probabilities` (M, K) are those of each of H heads, and neighbors (M, 1 + k) are indices. The selection loss of a
    head is the first minus the second; the lowest one is best.
    """
    consistency, entropies = [], []
    for p in probabilities:
        chunk_size = max(1, MAX_ELEMENTS_PER_CHUNK // (neighbors.shape[1] * p.shape[1]))
        chunks = zip(p.split(chunk_size), neighbors.split(chunk_size), strict=True)
        total = torch.stack([disagreements(own[:, None], p[indices]).double().sum() for own, indices in chunks]).sum()
        consistency.append((total / neighbors.numel()).to(p.dtype))
        entropies.append(entropy(p.mean(0)))
    return torch.stack(consistency), torch.stack(entropies)
