"""RGC: reinforcement graph clustering with an unknown number of clusters.

Liu et al., ACM MM 2023, arXiv 2308.06827. The nodes of an attributed graph are embedded by two linear maps of their
features, which are smoothed over the graph first. In each epoch a small network Q, or chance, chooses the number of
clusters K (the action), and k-means makes so many clusters of the embedding. The encoder then learns to tell nodes
apart and to move them away from what they are far from already. How well the clusters are apart is the reward, from
which Q learns. Vectors without a graph are joined to their nearest neighbours. The clusters belong to the nodes of this
one graph: nothing follows for others. The final clustering is k-means with the K that Q prefers after the last epoch.

This follows the code of the authors, because the text of the paper was not available. The file is longer than most:
it holds two networks that learn from each other.

Differs from the authors' code in:
- The result. It is that of the last epoch, by the preferred action. Their figures are those of the epoch that agrees
  best with the labels.
- The reward. With `reward: silhouette` it is the silhouette of the clusters. Theirs, `reward: paper`, grows with K on
  images, so that the largest K is chosen.
- k-means. Of all starts, the one whose rows are closest to their nearest centre is taken (theirs: closest to all
  centres), and a cluster without rows takes the farthest row (theirs: not a number).
- Large graphs. An epoch may have several steps, each on a random part of the nodes, and Q sees at most MAX_Q_NODES.
- Principal components. They are computed exactly (theirs: by a randomised method).
- The replay buffer. It holds the weights of the encoder at each epoch in place of the embeddings, which follow exactly.
- Several processes. A step takes the nodes of all of them (theirs: one device).

Logged:
- `train/contrast`: the contrast of the two embeddings of a node with those of all others.
- `train/cluster`: the weighted divergence of the assignments from their sharpened form.
- `train/num_clusters`, `train/reward`: the K of the epoch and its reward.
- `train/greedy`: 1 where Q has chosen this K, 0 where chance has.
"""

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import Adam, Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.assignment_rules import cluster_means, mean_squared_distance
from deepclust.clustering.graph_smoothing import make_adjacency, smooth_over_graph
from deepclust.clustering.kmeans_distances import centroid_logits, squared_distances
from deepclust.clustering.kmeans_seeding import seed_kmeans_plus_plus
from deepclust.clustering.neighbor_graph import build_cosine_graph
from deepclust.clustering.unit_rows import draw_rows
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.engine.randomness import make_generator
from deepclust.errors import InputError
from deepclust.losses.contrastive import nt_xent
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule
from deepclust.number_types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

log = logging.getLogger(__name__)

Activation = Literal["identity", "sigmoid"]
MAX_Q_NODES = 2048  # that the Q network sees
MAX_SILHOUETTE_NODES = 2000
EPOCHS_REPORTED = 100  # at the end, over which the choices of the Q network are counted


class RGC(ClusteringMethod):
    """RGC on the features of `backbone`, which is not trained.

    The arguments not listed here are those of `ClusteringMethod`.

    Args of the graph:
        num_images: number M of nodes.
        num_neighbors: number of nearest rows by cosine that a vector is joined to, where the data set has no graph.
        max_components: rows with more numbers are replaced by so many principal components.
        smoothing_steps: how often features are averaged over the neighbours of a node.

    Args of the encoder:
        embedding_size: number d of the embedding.
        activation: applied to both embeddings before they get unit length.
        cluster_weight: weight of the divergence from the sharpened assignments.

    Args of the number of clusters:
        num_clusters: number K of clusters; auto: found between the following two.
        min_clusters: the smallest number that may be found.
        max_clusters: the largest one.
        reward: `silhouette` of the clusters, or the index of the `paper`.
        epsilon: the share of epochs in which the Q network chooses, in place of chance.
        buffer_size: number of epochs after which it is trained on what they gave.
        q_hidden_size: number of its hidden units.
        q_epochs: number of its steps then.
        q_lr: its learning rate.
        discount: weight of the value of the next state.

    Args of k-means:
        kmeans_starts: number of starts, of which the best is taken.
        kmeans_max_iterations: largest number of iterations.
        kmeans_tolerance: it ends when the square of the summed shifts of the centres is below this.
    """

    finds_num_clusters = True
    is_transductive = True
    node_features: Tensor
    node_marks: Tensor
    assignments: Tensor
    centroids: Tensor
    scale: Tensor
    found_clusters: Tensor
    reward_of_epoch: Tensor
    chosen_by_q: Tensor
    past_encoders: Tensor
    past_means: Tensor
    past_mean_counts: Tensor
    past_actions: Tensor
    past_rewards: Tensor
    num_past: Tensor
    num_e_steps: Tensor
    q_first_moments: Tensor
    q_second_moments: Tensor
    num_q_steps: Tensor
    q_nodes: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        num_images: PositiveInt,
        num_neighbors: PositiveInt,
        max_components: PositiveInt,
        smoothing_steps: NonNegativeInt,
        embedding_size: PositiveInt,
        activation: Activation,
        cluster_weight: NonNegativeFloat,
        num_clusters: PositiveInt | Literal["auto"],
        min_clusters: PositiveInt,
        max_clusters: PositiveInt,
        reward: Literal["silhouette", "paper"],
        epsilon: Fraction,
        buffer_size: PositiveInt,
        q_hidden_size: PositiveInt,
        q_epochs: NonNegativeInt,
        q_lr: PositiveFloat,
        discount: NonNegativeFloat,
        kmeans_starts: PositiveInt,
        kmeans_max_iterations: PositiveInt,
        kmeans_tolerance: NonNegativeFloat,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
    ) -> None:
        super().__init__(
            backbone=backbone.requires_grad_(False),
            num_clusters=1,  # until the E-step finds more
            optimizer=optimizer,
            schedule=schedule,
            e_step_every_n_epochs=1,
        )
        if isinstance(num_clusters, int):  # not auto
            min_clusters = max_clusters = num_clusters
        self.min_clusters, self.max_clusters = min_clusters, min(max_clusters, num_images)
        if self.min_clusters > self.max_clusters:
            raise InputError(
                f"method.min_clusters is {min_clusters}, method.max_clusters {max_clusters}, with {num_images} images",
                expected="a smallest number that is at most the largest one and the number of images",
                do="set method.min_clusters and method.max_clusters",
            )
        self.num_neighbors = num_neighbors
        self.smoothing_steps = smoothing_steps
        self.cluster_weight = cluster_weight
        self.reward = reward
        self.epsilon = epsilon
        self.buffer_size = buffer_size
        self.q_epochs = q_epochs
        self.q_lr = q_lr
        self.discount = discount
        self.kmeans_starts = kmeans_starts
        self.kmeans_max_iterations = kmeans_max_iterations
        self.kmeans_tolerance = kmeans_tolerance
        self.explores = False  # whether chance may choose the number of clusters: while it is trained

        num_features: int = backbone.num_features  # type: ignore[assignment]
        num_inputs = num_features if num_features <= max_components else min(max_components, num_images)
        num_actions = self.max_clusters - self.min_clusters + 1
        self.encoder = Encoder(num_inputs, embedding_size, activation)
        self.q_network = QNetwork(embedding_size, q_hidden_size, num_actions).requires_grad_(False)  # has its own steps
        num_weights, num_q_weights = (
            sum(p.numel() for p in network.parameters()) for network in (self.encoder, self.q_network)
        )

        # The graph, once it is built: smoothed features, and a number that tells the node by its own features.
        self.register_buffer("node_features", torch.zeros(num_images, num_inputs))
        self.register_buffer("node_marks", torch.zeros(num_images))
        # The clusters of the current epoch
        self.register_buffer("assignments", torch.zeros(num_images, dtype=torch.int64))
        self.register_buffer("centroids", torch.zeros(self.max_clusters, embedding_size))
        self.register_buffer("scale", torch.ones(()))  # mean squared distance of nodes to their centroids
        self.register_buffer("found_clusters", torch.ones((), dtype=torch.int64))
        self.register_buffer("reward_of_epoch", torch.zeros(()))
        self.register_buffer("chosen_by_q", torch.zeros(EPOCHS_REPORTED, dtype=torch.int64))  # K; 0: chance has chosen
        # The replay buffer: B + 1 states, and the actions and rewards between them
        self.register_buffer("past_encoders", torch.zeros(buffer_size + 1, num_weights))
        self.register_buffer("past_means", torch.zeros(buffer_size + 1, self.max_clusters, embedding_size))
        self.register_buffer("past_mean_counts", torch.zeros(buffer_size + 1, dtype=torch.int64))
        self.register_buffer("past_actions", torch.zeros(buffer_size, dtype=torch.int64))
        self.register_buffer("past_rewards", torch.zeros(buffer_size))
        self.register_buffer("num_past", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_e_steps", torch.zeros((), dtype=torch.int64))
        # The state of the optimiser of the Q network
        self.register_buffer("q_first_moments", torch.zeros(num_q_weights))
        self.register_buffer("q_second_moments", torch.zeros(num_q_weights))
        self.register_buffer("num_q_steps", torch.zeros((), dtype=torch.int64))
        q_nodes = torch.from_numpy(draw_rows(num_images, MAX_Q_NODES, "nodes of the Q network"))
        self.register_buffer("q_nodes", q_nodes, persistent=False)

    # The graph

    @torch.no_grad()
    def encode_all(
        self, batches: Iterable[Tensor], num_images: int, encode: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Return the embedding (M, d) of the nodes, which are all images of the fit set and no others.

        Raises:
            InputError: if these are other images.
        """
        rows = super().encode_all(batches, num_images, encode)
        if encode is not None:
            return rows
        waves = torch.arange(rows.shape[1], device=rows.device, dtype=torch.float64).cos()
        marks = (rows.double() @ waves).to(self.node_marks)
        if not self.num_e_steps:
            self.node_marks.copy_(marks)
            self.node_features.copy_(torch.from_numpy(self.smooth_rows(rows)))
        elif len(rows) != len(self.node_marks) or not torch.allclose(marks, self.node_marks, rtol=1e-3, atol=1e-3):
            raise InputError(
                "these are other images than those that RGC was trained on, and it clusters the nodes of one graph",
                expected="the same images in the same order",
                do="name the data set of the run, or train on these images",
            )
        return self.embed(self.node_features)

    def smooth_rows(self, rows: Tensor) -> NDArray[np.float64]:
        """Return the smoothed features (M, D) of the nodes with features `rows`."""
        from sklearn.decomposition import PCA  # takes half a second

        edges = self.trainer.datamodule.edges  # type: ignore[attr-defined]
        if edges is None:
            rows = normalize(rows, dim=1)
            adjacency = build_cosine_graph(rows, self.num_neighbors + 1).to_sparse()
            adjacency.data[:] = 1
        else:
            adjacency = make_adjacency(edges, len(rows))
        values, num_inputs = rows.double().cpu().numpy(), self.node_features.shape[1]
        if num_inputs < values.shape[1]:
            values = PCA(num_inputs, svd_solver="full").fit_transform(values)
        return smooth_over_graph(values, adjacency, self.smoothing_steps)

    @full_precision
    def embed(self, node_features: Tensor) -> Tensor:
        """Return the state of nodes, the mean (N, d) of their two embeddings."""
        return torch.stack(self.encoder(node_features)).mean(0)

    # A step of the encoder

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        batch.refuse_extra_images("and RGC clusters the nodes of one graph")
        pairs = distributed.all_gather_with_gradient(torch.cat(self.encoder(self.node_features[batch.indices]), 1))
        z1, z2 = pairs.chunk(2, 1)
        return self.compute_terms(z1, z2, self.centroids[: self.num_clusters])

    @replayable()
    def compute_terms(self, z1: Tensor, z2: Tensor, centroids: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms of the two embeddings (N, d) of nodes."""
        divergence = cluster_divergence(*soft_assignments((z1 + z2) / 2, centroids))
        return {"contrast": nt_xent(z1, z2, temperature=1.0), "cluster": self.cluster_weight * divergence}

    # The number of clusters

    def on_train_start(self) -> None:
        self.explores = True

    def on_train_end(self) -> None:
        self.explores = False

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        epoch = int(self.num_e_steps - 1) % EPOCHS_REPORTED
        self.log("train/num_clusters", float(self.num_clusters))
        self.log("train/reward", self.reward_of_epoch)
        self.log("train/greedy", float(self.chosen_by_q[epoch] > 0))

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """End the last epoch of the Q network, choose the next number of clusters, and make so many by k-means."""
        generator = make_generator(*key, "number of clusters")
        num_actions = self.max_clusters - self.min_clusters + 1
        draws = [int(torch.randint(num_actions, (), generator=generator)) for _ in range(2)]
        if not self.num_e_steps:
            first_clusters = self.run_kmeans(self.node_features, self.min_clusters + draws[0], (*key, "first"))
            self.assignments.copy_(first_clusters[0])
        means = compute_cluster_state(features, self.assignments)
        self.remember_state(means)
        values = self.q_network(features[self.q_nodes], means)
        is_random = self.explores and float(torch.rand((), generator=generator)) >= self.epsilon
        action = draws[1] if is_random else int(values.argmax())

        num_clusters = self.min_clusters + action
        assignments, centroids = self.run_kmeans(features, num_clusters, key)
        self.assignments.copy_(assignments)
        self.centroids.zero_()[:num_clusters] = centroids
        self.scale.copy_(mean_squared_distance(features, centroids, assignments))
        self.found_clusters.fill_(num_clusters)
        self.read_num_clusters()
        self.reward_of_epoch.fill_(self.compute_reward(features, assignments, centroids))
        self.chosen_by_q[self.num_e_steps % EPOCHS_REPORTED] = 0 if is_random else num_clusters
        self.num_e_steps += 1
        self.past_actions[self.num_past], self.past_rewards[self.num_past] = action, self.reward_of_epoch
        self.num_past += 1
        if not self.explores:
            self.report_choice(features, key)

    def run_kmeans(self, rows: Tensor, num_clusters: int, key: tuple[int | str, ...]) -> tuple[Tensor, Tensor]:
        """Return assignments (M,) and centroids (K, D) of rows (M, D), from the best start."""
        generator = make_generator(*key, "starts", num_clusters)
        first_seeds = torch.randint(len(rows), (self.kmeans_starts,), generator=generator)
        shape = self.kmeans_starts, num_clusters - 1, 2 + int(np.log(num_clusters))
        uniforms = torch.rand(shape, dtype=torch.float64, generator=generator)
        starts = rows[seed_kmeans_plus_plus(rows, first_seeds, uniforms, metric="euclidean")]
        inertias = torch.stack([squared_distances(rows, start).amin(1).double().sum() for start in starts])
        start = starts[int(inertias.argmin())]
        return run_lloyd(rows, start, max_iterations=self.kmeans_max_iterations, tolerance=self.kmeans_tolerance)

    def compute_reward(self, features: Tensor, assignments: Tensor, centroids: Tensor) -> float:
        """Return the reward of clusters of the state (M, d), a scalar."""
        if self.reward == "paper":
            return float(compute_paper_reward(features, centroids))
        return compute_silhouette(features, assignments)

    def remember_state(self, means: Tensor) -> None:
        """Store the state between two epochs, and train the Q network once there are enough of them."""
        position = int(self.num_past)
        self.past_encoders[position] = parameters_to_vector(self.encoder.parameters())
        self.past_means[position, : len(means)] = means
        self.past_mean_counts[position] = len(means)
        if position == self.buffer_size:
            self.train_q_network()
            for states in (self.past_encoders, self.past_means, self.past_mean_counts):
                states[0] = states[position]
            self.num_past.zero_()

    @torch.enable_grad()
    def train_q_network(self) -> None:
        """Train the Q network on all that the replay buffer holds."""
        encoder, network = copy.deepcopy(self.encoder), copy.deepcopy(self.q_network).requires_grad_(True)
        parameters = list(network.parameters())
        optimizer, sizes = Adam(parameters, lr=self.q_lr), [p.numel() for p in parameters]
        moments = zip(parameters, self.q_first_moments.split(sizes), self.q_second_moments.split(sizes), strict=True)
        for p, first, second in moments:  # parts of the buffers, which the optimiser changes in place
            step = torch.tensor(float(self.num_q_steps))
            optimizer.state[p] = {"step": step, "exp_avg": first.view_as(p), "exp_avg_sq": second.view_as(p)}
        states, nodes = [], self.node_features[self.q_nodes]
        for weights, means, count in zip(self.past_encoders, self.past_means, self.past_mean_counts, strict=True):
            vector_to_parameters(weights, encoder.parameters())
            with torch.no_grad():
                states.append((torch.stack(encoder(nodes)).mean(0), means[: int(count)]))
        for _ in range(self.q_epochs):
            values = torch.stack([network(*state) for state in states])
            loss = compute_q_loss(values[:-1], values[1:], self.past_actions, self.past_rewards, discount=self.discount)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.q_network.load_state_dict(network.state_dict())
        self.num_q_steps += self.q_epochs

    def report_choice(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Say how steady the number of clusters was, and which one the silhouette of the same embedding names."""
        chosen = self.chosen_by_q[self.chosen_by_q > 0]
        share = float((chosen == self.num_clusters).double().mean())
        numbers = range(self.min_clusters, self.max_clusters + 1)
        clusters = {k: self.run_kmeans(features, k, key)[0] for k in numbers}
        log.info(
            "RGC has found %d clusters, as in %.0f%% of the last choices of its Q network; by the silhouette alone it "
            "would be %d",
            *(self.num_clusters, 100 * share, max(numbers, key=lambda k: compute_silhouette(features, clusters[k]))),
        )

    def read_num_clusters(self) -> None:
        """Take over the number of clusters from the state."""
        self.num_clusters = int(self.found_clusters)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self.read_num_clusters()
        return result

    def e_step_assignments(self) -> Tensor:
        return self.assignments

    def cluster_logits(self, features: Tensor) -> Tensor:
        return centroid_logits(features, self.centroids[: self.num_clusters], metric="euclidean") / (2 * self.scale)


class Encoder(nn.Module):
    """Two linear maps of node features (N, D), with rows of unit length: z1 and z2 (N, d)."""

    def __init__(self, num_inputs: int, embedding_size: int, activation: Activation) -> None:
        super().__init__()
        self.first = nn.Linear(num_inputs, embedding_size)
        self.second = nn.Linear(num_inputs, embedding_size)
        self.activation = nn.Sigmoid() if activation == "sigmoid" else nn.Identity()

    def forward(self, node_features: Tensor) -> tuple[Tensor, Tensor]:
        z1, z2 = (self.activation(linear(node_features)) for linear in (self.first, self.second))
        return normalize(z1, dim=1), normalize(z2, dim=1)


class QNetwork(nn.Module):
    """The values (A,) of all actions, which sum to 1, from the nodes (N, d) and cluster means (C, d) of a state."""

    def __init__(self, embedding_size: int, hidden_size: int, num_actions: int) -> None:
        super().__init__()
        self.node_layer = nn.Linear(embedding_size, hidden_size)
        self.cluster_layer = nn.Linear(embedding_size, hidden_size)
        self.value_layer = nn.Linear(hidden_size, num_actions)

    def forward(self, nodes: Tensor, means: Tensor) -> Tensor:
        hidden = torch.cat([normalize(self.node_layer(nodes), dim=1), normalize(self.cluster_layer(means), dim=1)])
        return self.value_layer(hidden.relu()).softmax(1).mean(0)


@full_precision
def soft_assignments(state: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return assignments q (N, K) of the state (N, d), and p (N, K), their sharpened form; both carry gradient.

    q_ij is in proportion to |z_i - c_j|^2 + 1, so it grows with the distance; p_ij to q_ij^2 / sum_i q_ij.
    """
    distances = squared_distances(state, centroids) + 1
    q = distances / distances.sum(1, keepdim=True)
    p = q.square() / q.sum(0)
    return q, p / p.sum(1, keepdim=True)


@full_precision
def cluster_divergence(q: Tensor, p: Tensor) -> Tensor:
    """Return the mean of p log(p / q) over all entries of q and p (N, K), a scalar; both get a gradient."""
    return kl_div(q.log(), p, reduction="none").mean()


def compute_cluster_state(state: Tensor, assignments: Tensor) -> Tensor:
    """Return the means (C, d) of the clusters of the state (M, d), 0 for an empty one; C - 1 is the largest cluster."""
    return cluster_means(state, assignments, int(assignments.max()) + 1).nan_to_num(0)


def compute_paper_reward(state: Tensor, centroids: Tensor) -> Tensor:
    """Return how far centroids (K, d) are apart, less how far the state (M, d) is from them; a scalar.

    The mean of |c_a - c_b|^2 over all K^2 pairs, less the mean of min_j |z_i - c_j|^2 + 1.
    """
    return squared_distances(centroids, centroids).mean() - (squared_distances(state, centroids) + 1).amin(1).mean()


def compute_silhouette(state: Tensor, assignments: Tensor) -> float:
    """Return the mean silhouette of clusters of the state (M, d), on a fixed sample; 0 where it is not defined."""
    from sklearn.metrics import silhouette_score  # takes half a second

    nodes = draw_rows(len(state), MAX_SILHOUETTE_NODES, "nodes of the silhouette")
    rows, clusters = state.cpu().numpy()[nodes], assignments.cpu().numpy()[nodes]
    is_defined = 2 <= len(np.unique(clusters)) < len(rows)
    return float(silhouette_score(rows, clusters)) if is_defined else 0.0


def compute_q_loss(values: Tensor, next_values: Tensor, actions: Tensor, rewards: Tensor, *, discount: float) -> Tensor:
    """Return the mean squared temporal difference of B transitions, a scalar.

    The mean of (r + discount max_a Q'_a - Q_action)^2, with the values Q and Q' (B, A) of the states before and after.
    Both carry gradient.
    """
    targets = rewards + discount * next_values.amax(1)
    return (targets - values.gather(1, actions[:, None])[:, 0]).square().mean()


def run_lloyd(rows: Tensor, start: Tensor, *, max_iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return assignments (M,) of rows (M, D) and centroids (K, D), from those of `start` (K, D), by k-means.

    It ends when the squared sum of the lengths by which the centroids have moved is below `tolerance`. The assignments
    are those to the centroids before the last move. A cluster without rows takes the farthest row.
    """
    centroids = start
    for _ in range(max_iterations):
        distances, assignments = squared_distances(rows, centroids).min(1)
        means = cluster_means(rows, assignments, len(centroids))
        if num_empty := int((is_empty := means.isnan().any(1)).sum()):
            means[is_empty] = rows[distances.argsort(descending=True, stable=True)[:num_empty]]
        shift, centroids = (means - centroids).norm(dim=1).sum(), means
        if float(shift) ** 2 < tolerance:
            break
    return assignments, centroids
