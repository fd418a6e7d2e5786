"""GCC: graph contrastive clustering (Zhong, Wu, Chen, Huang, Deng, Nie, Lin, Hua; ICCV 2021, arXiv 2104.01429).

One backbone with two heads is trained from scratch. In the first epochs (warm-up), only the features of the two views
of an image are contrasted with those of the batch. Then a graph of nearest neighbours is built every few epochs from
features that were remembered during training. It is used twice. In the contrast of images, the neighbours of an image
are positives too, each with a weight that falls with the neighbour's degree. In the contrast of clusters, the columns
of the assignments of images are compared with those of random neighbours: a cluster is to agree with itself and to
differ from the other clusters. The entropy of the mean assignment keeps the clusters even. The final clustering is the
arg max of the cluster head, a single linear layer. Self-labelling, the paper's optional second stage, is
`deepclust.methods.self_label`.

Differs from the paper or its code in:
- Identity of images. An image is known by its index in the data set. In the authors' first graph on STL-10, the same
  position stands for an unlabelled image at one time and for a test image at another.
- Images without a remembered feature when the graph is built. The feature of their clean view is used.
- Clusters without any mass. 0 log 0 is 0 and their cosines are 0. In the authors' code the loss is NaN.
- Images that only help the representation. Each epoch without a graph begins with a pass over them. The authors mix
  them with the other images in these epochs, and leave them out after, too.
- Order. A batch passes the backbone before its neighbours (theirs: after), which running statistics notice.
- Several processes. Features and assignments are gathered with their gradients, so that N is the global batch.
- Small last batches. A batch below an eighth of the batch size is joined to the batch before it.
- Initialisation. A ResNet stem that replaces torchvision's is initialised as torch does it (theirs: He-normal,
  about half as large).
- The result. It is that of the last epoch. The authors keep the epoch that is best by the ground truth.

Logged, all of them weighted:
- `train/representation`: the contrast of images. With a graph it can be negative. Images that only help the
  representation, such as the unlabelled ones of STL-10, contribute to this term only, until there is a graph.
- `train/assignment`: the contrast of clusters, at least log(1 + (K - 1) / e). 0 before there is a graph.
- `train/balance`: log K minus the entropy of the mean assignment. 0 before there is a graph.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.neighbors import neighbors_on_all_ranks
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.losses.balance import cluster_size_entropy_deficit
from deepclust.losses.contrastive import info_nce
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule
from deepclust.number_types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class FeatureBank(nn.Module):
    """The last `size` features (D,) of each of M images, and how many features each image has had in total."""

    rows: Tensor
    counts: Tensor

    def __init__(self, *, num_images: int, size: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_images, size, num_features))
        self.register_buffer("counts", torch.zeros(num_images, dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Tensor, indices: Tensor) -> None:
        """Store `rows` (N, D), one for each of the images `indices` (N,), in place of their oldest features.

        No image may appear twice.
        """
        slots = self.counts[indices] % self.rows.shape[1]
        self.rows[indices, slots] = rows.to(self.rows.dtype)
        self.counts[indices] += 1

    def mean(self) -> Tensor:
        """Return the means (M, D) of the stored features of each image, not normalised; 0 for images without any."""
        num_stored = self.counts.clamp(1, self.rows.shape[1])
        return self.rows.sum(1) / num_stored.unsqueeze(1)


class GCC(ClusteringMethod):
    """GCC without self-labelling.

    The arguments not listed here are those of `ClusteringMethod`. Symbols are those of the paper and its code.

    Args of the networks:
        embedding_size: size D of the output of the contrastive head.

    Args of the graph:
        num_images: number M of images that are clustered; each has remembered features and a list of neighbours.
        bank_size: number of features that are remembered for an image; their mean is searched for neighbours.
        num_neighbors: number k of neighbours in a list. A list has k + 1 entries, because an image mostly lists itself.
        num_positives: number of entries from the top of a list that are positives in the contrast of images.
        warmup_epochs: number of epochs without a graph.
        graph_every_n_epochs: number of epochs between two graphs.

    Args of the objective:
        temperature: temperature t of the contrast of images; that of the contrast of clusters is 1.
        representation_weight: weight of the contrast of images (L_RGC); that of the contrast of clusters is 1.
        balance_weight: weight of the balance of clusters (L_NE of the code, L_CR of the paper).
    """

    num_views = 2

    neighbors: Tensor
    weights: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_images: PositiveInt,
        num_clusters: PositiveInt,
        embedding_size: PositiveInt,
        bank_size: PositiveInt,
        num_neighbors: PositiveInt,
        num_positives: PositiveInt,
        warmup_epochs: NonNegativeInt,
        graph_every_n_epochs: PositiveInt,
        temperature: PositiveFloat,
        representation_weight: NonNegativeFloat,
        balance_weight: NonNegativeFloat,
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
        width: int = backbone.num_features  # type: ignore[assignment]
        self.contrastive_head = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, embedding_size)
        )
        self.cluster_head = nn.Linear(width, num_clusters)
        self.bank = FeatureBank(num_images=num_images, size=bank_size, num_features=embedding_size)
        # (M, num_neighbors + 1), nearest first; -1 until there is a graph
        self.register_buffer("neighbors", torch.full((num_images, num_neighbors + 1), -1))
        self.register_buffer("weights", torch.zeros(num_images))  # (M,), weight of each image where it is a neighbour
        self.num_positives = num_positives
        self.warmup_epochs = warmup_epochs
        self.graph_every_n_epochs = graph_every_n_epochs
        self.temperature = temperature
        self.representation_weight = representation_weight
        self.balance_weight = balance_weight

    # One step

    @property
    def is_warming_up(self) -> bool:
        """Whether there is no graph in the current epoch."""
        return self.current_epoch < self.warmup_epochs

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        # As in the authors' code, both views share batch statistics, and each view of neighbours has its own.
        h_0, h_1 = self.backbone(torch.cat(batch.views)).chunk(2)
        has_graph = not self.is_warming_up and not batch.extra
        self.leave_untrained(() if has_graph else self.cluster_head.parameters())
        if has_graph:
            assert batch.companions is not None
            *positives, partner = (self.backbone(view) for view in batch.companion_views)
            return self.compute_terms_and_update_bank(batch.indices, batch.companions, partner, h_0, h_1, *positives)
        f_0, f_1 = self.embed(h_0), self.embed(h_1)
        if not batch.extra:
            self.bank.push(distributed.all_gather(f_1), distributed.all_gather(batch.indices))
        f_0, f_1 = distributed.all_gather_with_gradient(torch.stack([f_0, f_1], 1)).unbind(1)
        contrast = self.representation_weight * pretext_contrast_loss(f_0, f_1, temperature=self.temperature)
        # DDP expects a gradient of every parameter, so the cluster head gets one of 0.
        zero = 0.0 * (self.cluster_logits(h_0.detach()).sum() + contrast.detach())
        return {"representation": contrast, "assignment": zero, "balance": zero}

    @replayable()
    def compute_terms_and_update_bank(
        self, indices: Tensor, companions: Tensor, partner: Tensor, *features: Tensor
    ) -> dict[str, Tensor]:
        """Return the weighted terms of the images `indices` (N,) with a graph; store their features in the bank.

        `features` (N, D) are those of both views and of P neighbours, `partner` (N, D) that of one more neighbour.
        `companions` (N, P + 1) are the indices of these neighbours.
        """
        embeddings = [self.embed(h) for h in features]
        self.bank.push(distributed.all_gather(embeddings[1]), distributed.all_gather(indices))
        logits = torch.stack([self.cluster_logits(features[0]), self.cluster_logits(partner)], 1)
        neighbors = distributed.all_gather(companions)[:, : self.num_positives]
        all_embeddings = distributed.all_gather_with_gradient(torch.stack(embeddings, 1))
        all_logits = distributed.all_gather_with_gradient(logits)
        return self.compute_terms(all_embeddings, self.weights[neighbors], all_logits)

    @full_precision
    def embed(self, features: Tensor) -> Tensor:
        """Return the output of the contrastive head for features (N, D), as unit vectors (N, D)."""
        return F.normalize(self.contrastive_head(features), dim=1)

    def compute_terms(self, embeddings: Tensor, weights: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the global batch with a graph.

        embeddings (N, 2 + P, D) are unit vectors of both views and of P neighbours, whose weights are `weights` (N, P).
        logits (N, 2, K) are those of the first view and of the partner.
        """
        f_0, f_1, *neighbors = embeddings.unbind(1)
        contrast = graph_contrast_loss(f_0, f_1, torch.stack(neighbors), weights.T, temperature=self.temperature)
        assignment, balance = assignment_losses(*logits.unbind(1))
        return {
            "representation": self.representation_weight * contrast,
            "assignment": assignment,
            "balance": self.balance_weight * balance,
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        cluster_head = list(self.cluster_head.parameters())
        cluster_head_ids = {id(p) for p in cluster_head}
        # The cluster head is a group of its own because its training begins later. torch's fused SGD initialises the
        # momentum of all weights of a group in the same step.
        return [{"params": [p for p in self.parameters() if id(p) not in cluster_head_ids]}, {"params": cluster_head}]

    # Extra images, which take part until there is a graph

    def uses_extra_images(self, epoch: int) -> bool:
        return epoch < self.warmup_epochs

    def locate_step(self, step: int) -> tuple[float, float]:
        datamodule, num_accumulated = self.trainer.datamodule, self.trainer.accumulate_grad_batches  # type: ignore[attr-defined]
        if datamodule.extra is None:
            return super().locate_step(step)
        fit, extra = (datamodule.count_batches(s) / num_accumulated for s in (datamodule.fit, datamodule.extra))
        if step <= self.warmup_epochs * (fit + extra):
            return step, fit + extra
        return step - self.warmup_epochs * extra, fit  # as if the epochs before had been as short

    # The graph

    def companions(self, indices: Tensor, draws: Draws) -> Tensor | None:
        """Return the positives of each image and a partner that is drawn from its whole list, (N, P + 1)."""
        if self.is_warming_up:
            return None
        lists = self.neighbors_on_cpu[indices]
        drawn = torch.randint(lists.shape[1], (len(lists), 1), generator=draws.make_generator("companions"))
        return torch.cat([lists[:, : self.num_positives], lists.gather(1, drawn)], 1)

    def on_train_start(self) -> None:
        if not self.is_warming_up and bool((self.neighbors < 0).any()):
            self.rebuild_graph()
        self.neighbors_on_cpu = self.neighbors.cpu()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        epochs_since_warmup = self.current_epoch - self.warmup_epochs
        if epochs_since_warmup >= 0 and epochs_since_warmup % self.graph_every_n_epochs == 0:
            self.rebuild_graph()

    @torch.no_grad()
    def rebuild_graph(self) -> None:
        """Compute the neighbour lists and the weights of all images from the features in the bank."""
        started = time.perf_counter()
        features = self.bank.mean()
        is_missing = self.bank.counts == 0
        if is_missing.any():
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
            clean_batches = datamodule.clean_batches(datamodule.fit, self.device)
            encoded = self.encode_all(clean_batches, len(features))
            features[is_missing] = self.embed(encoded[is_missing]).to(features)
        self.neighbors.copy_(neighbor_lists(features, self.neighbors.shape[1]))
        self.weights.copy_(degree_weights(self.neighbors, self.num_positives))
        self.neighbors_on_cpu = self.neighbors.cpu()
        self.e_step_seconds += time.perf_counter() - started

    # The final clustering

    @full_precision
    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.cluster_head(features)


@full_precision
def pretext_contrast_loss(f_0: Tensor, f_1: Tensor, *, temperature: float) -> Tensor:
    """Return the contrast of images without a graph, a scalar, of the unit embeddings (N, D) of two views.

    -1/N sum_i log( exp(f0_i . f1_i / t) / sum_{g in f0, f1} exp(f0_i . g / t) ). As in the authors' code, the sum in
    the denominator contains the anchor f0_i itself.
    """
    logits = f_0 @ torch.cat([f_0, f_1]).T / temperature
    return F.cross_entropy(logits, torch.arange(len(f_0), 2 * len(f_0), device=f_0.device))


@full_precision
def graph_contrast_loss(f_0: Tensor, f_1: Tensor, neighbors: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    """Return the contrast of images with a graph, a scalar that can be negative.

    f_0 and f_1 (N, D) are the unit embeddings of two views, neighbors (P, N, D) those of P neighbours of each image and
    weights (P, N) the weights w of these neighbours. The columns g are all of f0, f1 and w n. With
    e_ig = exp(f0_i . g / t), multiplied by w once more for the neighbours of i, the loss is
    -1/N sum_i log( sum of e_ig over the other view and the neighbours of i / sum of e_ig over all other columns ).
    The anchor f0_i itself is among the other columns.
    """
    batch_size = len(f_0)
    columns = torch.cat([f_0, f_1, (weights.unsqueeze(2) * neighbors).flatten(0, 1)])
    logits = f_0 @ columns.T / temperature  # (N, (2 + P) N)
    own = logits.unflatten(1, (-1, batch_size)).diagonal(dim1=0, dim2=2)  # (2 + P, N), each image with its own columns
    positives = torch.cat([own[1:2], own[2:] + weights.log()]).logsumexp(0)
    is_positive = torch.eye(batch_size, dtype=torch.bool, device=f_0.device).repeat(1, len(own))
    is_positive[:, :batch_size] = False
    return (logits.masked_fill(is_positive, -torch.inf).logsumexp(1) - positives).mean()


@full_precision
def assignment_losses(logits: Tensor, partner_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the contrast of clusters and their imbalance, two scalars, of the logits (N, K) of images and partners.

    The contrast compares columns of probabilities by their cosine, at temperature 1; the cosine of an empty column is
    0. The imbalance is log K minus the entropy of the images' mean probabilities.
    """
    p, r = logits.softmax(1), partner_logits.softmax(1)
    columns, partner_columns = (F.normalize(probabilities, dim=0, eps=1e-12).T for probabilities in (p, r))
    return info_nce(columns, partner_columns, temperature=1.0), cluster_size_entropy_deficit(p)


def neighbor_lists(features: Tensor, length: int) -> Tensor:
    """Return the indices (M, length) of the features (M, D) with the largest inner product with each, largest first.

    A feature can be its own neighbour. It need not come first, because features are means of unit vectors and can be
    short. All processes share the search.
    """
    return neighbors_on_all_ranks(features, length, metric="inner_product", excludes_itself=False)[1]


def degree_weights(neighbors: Tensor, num_positives: int) -> Tensor:
    """Return the weight (M,) of each image as a neighbour, sqrt(num_positives / |S_i|), from neighbour lists (M, L).

    S_i is the set of images that i lists or that list i.
    """
    num_images = len(neighbors)
    rows = torch.arange(num_images, device=neighbors.device).unsqueeze(1).expand_as(neighbors)
    pairs = torch.cat([rows * num_images + neighbors, neighbors * num_images + rows]).unique()
    return (num_positives / torch.bincount(pairs // num_images, minlength=num_images).double()).sqrt()
