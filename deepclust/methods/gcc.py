"""GCC: graph contrastive clustering (Zhong, Wu, Chen, Huang, Deng, Nie, Lin, Hua; ICCV 2021, arXiv 2104.01429).

One backbone with two heads, trained together from scratch. At first, features of two views of an image are contrasted
against the batch. Then a graph of nearest neighbours, built every few epochs from the features that training itself
left behind, joins in twice: an image is pulled to its neighbours as it is to its own other view, each by a weight
that falls with the neighbour's degree; and the assignments of an image and of a random neighbour are contrasted
column by column, a cluster over the batch against the other clusters, while the entropy of the mean assignment keeps
the clusters even. The clustering is the arg-max of the cluster head, a single linear layer.

Differs from the paper or its code in:
- images are known by their number in the data set. In the authors' first graph on STL-10, positions mean unlabelled
  images in one half of the run and test images in the other.
- an image without a remembered feature when the graph is built gets its clean view's.
- a cluster without any mass: 0 log 0 is 0 and its cosines are 0; theirs is not a number.
- images that only help the representation: each epoch begins with a pass over them; theirs mixes them with the others
  and leaves them out once there is a graph.
- several processes: features and assignments are gathered with their gradients, so that N is the global batch.
- a last batch below an eighth of a full one joins the batch before it.
- a replaced ResNet stem starts as torch starts it (theirs: He-normal).
- the last epoch counts; theirs keeps the epoch that is best by labels.
Self-labelling, the paper's optional second stage, is a method of its own.

Logged, weighted: `train/representation`, contrast of images, which may be negative once there is a graph;
`train/assignment`, contrast of clusters, at least log(1 + (K - 1) / e); `train/balance`, what the entropy of the mean
assignment lacks to log K. The last two are 0 before there is a graph. Images that only help the representation, such
as STL-10's unlabelled ones, count in the first, without a graph.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.neighbors import nearest_neighbors
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.losses.balance import entropy_deficit
from deepclust.losses.contrastive import info_nce
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule


class FeatureBank(nn.Module):
    """The last `size` features (D) of each of M images, and how many it has had."""

    rows: Tensor
    counts: Tensor

    def __init__(self, *, num_images: int, size: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(num_images, size, num_features))
        self.register_buffer("counts", torch.zeros(num_images, dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Tensor, indices: Tensor) -> None:
        """Put `rows` (N, D) of the different images `indices` (N,) in the place of their oldest."""
        slots = self.counts[indices] % self.rows.shape[1]
        self.rows[indices, slots] = rows.to(self.rows.dtype)
        self.counts[indices] += 1

    def mean(self) -> Tensor:
        """The mean (M, D) of what each image has, not of unit length; 0 where it has nothing."""
        held = self.counts.clamp(1, self.rows.shape[1])
        return self.rows.sum(1) / held.unsqueeze(1)


class GCC(ClusteringMethod):
    """GCC's first stage: `warmup_epochs` without a graph, then with one that is renewed `graph_every_n_epochs`.

    An image lists its `num_neighbors` nearest and, as a rule, itself; the first `num_positives` of the list are
    positives beside its own other view, and any one of it is the partner whose clusters it should share.
    """

    neighbors: Tensor
    weights: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_images: int,
        num_clusters: int,
        embedding_size: int,
        bank_size: int,
        num_neighbors: int,
        num_positives: int,
        warmup_epochs: int,
        graph_every_n_epochs: int,
        temperature: float,
        representation_weight: float,
        balance_weight: float,
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
        # (M, num_neighbors + 1), best first; -1 until there is a graph
        self.register_buffer("neighbors", torch.full((num_images, num_neighbors + 1), -1))
        self.register_buffer("weights", torch.zeros(num_images))  # (M,), of each image as somebody's neighbour
        self.num_positives = num_positives
        self.warmup_epochs = warmup_epochs
        self.graph_every_n_epochs = graph_every_n_epochs
        self.temperature = temperature
        self.representation_weight = representation_weight
        self.balance_weight = balance_weight

    # One step

    @property
    def warming_up(self) -> bool:
        """Whether the present epoch does without a graph."""
        return self.current_epoch < self.warmup_epochs

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        # Both views together, then each neighbour on its own: these share batch statistics.
        h_0, h_1 = self.backbone(torch.cat(batch.views)).chunk(2)
        if not self.warming_up and not batch.extra:
            assert batch.companions is not None
            *positives, partner = (self.backbone(view) for view in batch.companion_views)
            return self.objective(batch.indices, batch.companions, partner, h_0, h_1, *positives)
        f_0, f_1 = self.embed(h_0), self.embed(h_1)
        if not batch.extra:
            self.bank.push(distributed.gather(f_1), distributed.gather(batch.indices))
        f_0, f_1 = distributed.gather_with_gradient(torch.stack([f_0, f_1], 1)).unbind(1)
        contrast = self.representation_weight * pretext_contrast(f_0, f_1, temperature=self.temperature)
        # DDP waits for a gradient of every parameter.
        nothing = 0.0 * (self.cluster_logits(h_0.detach()).sum() + contrast.detach())
        return {"representation": contrast, "assignment": nothing, "balance": nothing}

    @replayable()
    def objective(self, indices: Tensor, companions: Tensor, partner: Tensor, *features: Tensor) -> dict[str, Tensor]:
        """The weighted terms of images `indices` (N,) with a graph; fills the bank.

        `features` (N, D) of both views and of P neighbours, `partner` (N, D) of one more: `companions` (N, P + 1).
        """
        rows = [self.embed(h) for h in features]
        self.bank.push(distributed.gather(rows[1]), distributed.gather(indices))
        logits = torch.stack([self.cluster_logits(features[0]), self.cluster_logits(partner)], 1)
        neighbors = distributed.gather(companions)[:, : self.num_positives]
        gathered = distributed.gather_with_gradient(torch.stack(rows, 1))
        return self.terms(gathered, self.weights[neighbors], distributed.gather_with_gradient(logits))

    @full_precision
    def embed(self, features: Tensor) -> Tensor:
        """Unit rows (N, D) of the contrastive head."""
        return F.normalize(self.contrastive_head(features), dim=1)

    def terms(self, features: Tensor, weights: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """The weighted terms of the global batch, with a graph.

        features (N, 2 + P, D): unit rows of both views and of P neighbours, whose weights are `weights` (N, P);
        logits (N, 2, K): of the first view and of the partner.
        """
        f_0, f_1, *neighbors = features.unbind(1)
        contrast = graph_contrast(f_0, f_1, torch.stack(neighbors), weights.T, temperature=self.temperature)
        assignment, balance = assignment_losses(*logits.unbind(1))
        return {
            "representation": self.representation_weight * contrast,
            "assignment": assignment,
            "balance": self.balance_weight * balance,
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        head = list(self.cluster_head.parameters())
        taken = {id(p) for p in head}
        # Apart, for it begins to move later, and torch's fused SGD begins a group with all of its weights at once.
        return [{"params": [p for p in self.parameters() if id(p) not in taken]}, {"params": head}]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.warming_up:  # a gradient of 0 would still bring weight decay and momentum
            for p in self.cluster_head.parameters():
                p.grad = None

    # The graph

    def companions(self, indices: Tensor, draws: Draws) -> Tensor | None:
        """The first positives of each list and a partner drawn from all of it, (N, P + 1)."""
        if self.warming_up:
            return None
        lists = self.neighbors_at_hand[indices]
        drawn = torch.randint(lists.shape[1], (len(lists), 1), generator=draws.generator("companions"))
        return torch.cat([lists[:, : self.num_positives], lists.gather(1, drawn)], 1)

    def on_train_start(self) -> None:
        if not self.warming_up and bool((self.neighbors < 0).any()):
            self.renew_graph()
        self.neighbors_at_hand = self.neighbors.cpu()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        since = self.current_epoch - self.warmup_epochs
        if since >= 0 and since % self.graph_every_n_epochs == 0:
            self.renew_graph()

    @torch.no_grad()
    def renew_graph(self) -> None:
        """Lists and weights of all images by what the bank holds."""
        started = time.perf_counter()
        features = self.bank.mean()
        absent = self.bank.counts == 0
        if absent.any():
            datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
            clean = datamodule.clean_batches(datamodule.fit, self.device)
            features[absent] = self.embed(self.encode_all(clean, len(features))[absent]).to(features)
        self.neighbors.copy_(neighbor_lists(features, self.neighbors.shape[1]))
        self.weights.copy_(degree_weights(self.neighbors, self.num_positives))
        self.neighbors_at_hand = self.neighbors.cpu()
        self.e_step_seconds += time.perf_counter() - started

    # The clusters

    @full_precision
    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.cluster_head(features)


@full_precision
def pretext_contrast(f_0: Tensor, f_1: Tensor, *, temperature: float) -> Tensor:
    """Contrast of images without a graph: unit rows f_0 against all of f_0 and f_1, both (N, D); a scalar.

    -1/N sum_i log( exp(f0_i . f1_i / t) / sum_{g in f0, f1} exp(f0_i . g / t) ): an anchor meets itself among the
    others, as in the authors' code.
    """
    logits = f_0 @ torch.cat([f_0, f_1]).T / temperature
    return F.cross_entropy(logits, torch.arange(len(f_0), 2 * len(f_0), device=f_0.device))


@full_precision
def graph_contrast(f_0: Tensor, f_1: Tensor, neighbors: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    """Contrast of images with a graph: rows f_0 against f_1 (N, D) and P `neighbors` of each image (P, N, D); a scalar.

    With columns g in f0, f1 and w n, where w are the neighbours' `weights` (P, N), and e_ig = exp(f0_i . g / t), times
    w once more for i's own neighbours: -1/N sum_i log( sum of e_ig over i's other view and own neighbours / sum over
    all other columns, i itself among them ). It may be negative.
    """
    size = len(f_0)
    columns = torch.cat([f_0, f_1, (weights.unsqueeze(2) * neighbors).flatten(0, 1)])
    logits = f_0 @ columns.T / temperature  # (N, (2 + P) N)
    own = logits.unflatten(1, (-1, size)).diagonal(dim1=0, dim2=2)  # (2 + P, N)
    positives = torch.cat([own[1:2], own[2:] + weights.log()]).logsumexp(0)
    positive = torch.eye(size, dtype=torch.bool, device=f_0.device).repeat(1, len(own))
    positive[:, :size] = False
    return (logits.masked_fill(positive, -torch.inf).logsumexp(1) - positives).mean()


@full_precision
def assignment_losses(logits: Tensor, partner_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Contrast of clusters between images and their partners, and how uneven they are: of logits (N, K); two scalars.

    By the cosine of columns of probabilities, at temperature 1; that of an empty column is 0.
    """
    p, r = logits.softmax(1), partner_logits.softmax(1)
    columns, partner_columns = (F.normalize(c, dim=0, eps=1e-12).T for c in (p, r))
    return info_nce(columns, partner_columns, temperature=1.0), entropy_deficit(p)


def neighbor_lists(features: Tensor, length: int) -> Tensor:
    """The `length` rows of `features` (M, D) of largest inner product with each, (M, length), best first.

    A row takes part in its own search; as rows are means of unit vectors, it need not come first.
    """
    return nearest_neighbors(features, features, length, metric="inner_product", exclude=None)[1]


def degree_weights(neighbors: Tensor, num_positives: int) -> Tensor:
    """sqrt(`num_positives` / |S_i|) of each image (M,), S_i being those that i lists in `neighbors` (M, L) or that list
    i."""
    size = len(neighbors)
    rows = torch.arange(size, device=neighbors.device).unsqueeze(1).expand_as(neighbors)
    pairs = torch.cat([rows * size + neighbors, neighbors * size + rows]).unique()
    return (num_positives / torch.bincount(pairs // size, minlength=size).double()).sqrt()
