"""Self-EvoC: self-evolutionary clustering, a reconstruction from its abstracts (Wang, Lu and Liu, arXiv 2202.10505).

As SSC it appeared in Pattern Recognition, 2023: "Self-supervised clustering with assistance from off-the-shelf
classifier" (Wang, Lu, Luo and Liu). The abstracts describe the loop and give no formula, and no code of the authors is
known. Formulas and numbers are this project's own, so the figures of the paper cannot be expected of it.

It starts from an auto-encoder (`deepclust.methods.autoencoder`). k-means on its embeddings gives K centres. Then rounds
follow, each of which goes through five steps:

1. The fuzzy memberships of all embeddings in the centres, as in fuzzy c-means, say how certain each image is.
2. The most certain images of each cluster are its reliable ones.
3. A classifier learns the clusters of the reliable images on augmented views. It goes on from round to round.
4. What the classifier says about all images, without augmentation, is the target of the clustering network, in place
   of DEC's sharpened assignments.
5. Encoder and centres are trained towards the target by KL(p || q), and with the decoder to reconstruct the images.

Steps 1 and 2 are the E-step. A round has epochs that train the classifier, then epochs that train the clustering
network. Training stops when hardly an image has changed its cluster in two rounds.

What the abstracts leave open, and is chosen here:
- Score, rule of selection and number of rounds.
- Even clusters. With `even` each column of the target is divided by its sum, so that no cluster takes over.
- Unsure classifier. If it is unsure even of the images that it has learnt, the last target stays. The first is DEC's.
- Epochs of the classifier. They draw as many images as there are, evenly from the clusters. Two of them are five passes
  over the reliable images where these are 40 % of all.
- Cluster of an image. It is that of the nearest centre, not what the classifier says.

Logged:
- `train/classification`: the cross-entropy of the classifier, in its epochs.
- `train/clustering`, `train/reconstruction`: KL(p || q), and the weighted mean of the squared difference of all pixels.
- `round/changed`: the share of images whose cluster has changed since the last round.
- `round/reliable`: the share of images that are reliable.
- `round/confidence`: the mean largest probability of the classifier on the reliable images, as of the last target.
- `round/agreement`: the share of all images that the classifier puts into their clusters, likewise.

The module has a few lines more than others, so that a whole round can be read in one place.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from deepclust.clustering.reliable_images import Certainty, fuzzy_memberships, measure_certainty, select_reliable
from deepclust.clustering.student_assignments import student_logits, target_distribution, target_divergence
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.losses.reconstruction import reconstruction_loss
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.decoder import find_decoder
from deepclust.nn.optimizer_per_group import OptimizerPerGroup
from deepclust.nn.schedules import Schedule
from deepclust.number_types import LARGEST_FLOAT, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

log = logging.getLogger(__name__)


class SelfEvoC(ClusteringMethod):
    """Self-EvoC, on the auto-encoder of an earlier run.

    The arguments not listed here are those of `ClusteringMethod`. The E-step begins a round.

    Args of the networks:
        backbone: the encoder, from images to embeddings (N, D).
        decoder: from embeddings (N, D) to images. It is used and trained only with a `reconstruction_weight`.
        classifier: from images to features (N, F), with F its attribute `num_features`; a linear layer follows it.
        num_images: number M of images that are clustered; each has a target.

    Args of the reliable images:
        fuzzifier: the exponent m of fuzzy c-means; the memberships are hard near 1 and alike for large values.
        certainty: what it is measured by, the entropy of the memberships or the margin between the two largest.
        first_share, share_growth, largest_share: in round r (from 1), the share first + r * growth of each cluster is
            reliable, up to the largest.
        least_reliable: number of images of a cluster that are reliable at least, if it has as many.

    Args of the target:
        label_smoothing: share of the classifier's labels that is spread evenly over all clusters.
        target_temperature: the classifier's logits are divided by it.
        even: whether the target gives all clusters about the same weight.
        min_confidence: mean largest probability of the classifier on the reliable images below which the target stays.

    Args of the objective:
        alpha: degrees of freedom of Student's t-distribution.
        reconstruction_weight: weight of the reconstruction loss.

    Args of the schedule:
        classifier_epochs: epochs of the classifier in a round.
        clustering_epochs: epochs of the clustering network in a round.
        stop_below: a round is stable if the share of images that have changed their cluster is lower; 0: never.
        stop_after_rounds: training stops after so many stable rounds in a row.
        classifier_optimizer: makes the classifier's optimiser; `optimizer` that of the clustering network.

        kmeans_restarts, kmeans_max_iterations, kmeans_tolerance: of the k-means that sets the centres, whose best
            restart is kept.
    """

    num_views = 2  # of the clustering network, and of the classifier
    assignments: Tensor
    is_reliable: Tensor
    targets: Tensor
    rounds_begun: Tensor
    num_changed: Tensor
    stable_rounds: Tensor
    confidence: Tensor
    agreement: Tensor

    def __init__(
        self,
        *,
        backbone: nn.Module,
        decoder: nn.Module,
        classifier: nn.Module,
        num_images: PositiveInt,
        num_clusters: PositiveInt,
        fuzzifier: Annotated[float, Gt(1), Le(LARGEST_FLOAT)],
        certainty: Certainty,
        first_share: Fraction,
        share_growth: Fraction,
        largest_share: Fraction,
        least_reliable: PositiveInt,
        label_smoothing: Fraction,
        target_temperature: PositiveFloat,
        even: bool,
        min_confidence: Fraction,
        alpha: PositiveFloat,
        reconstruction_weight: NonNegativeFloat,
        classifier_epochs: PositiveInt,
        clustering_epochs: PositiveInt,
        stop_below: Fraction,
        stop_after_rounds: PositiveInt,
        kmeans_restarts: PositiveInt,
        kmeans_max_iterations: PositiveInt,
        kmeans_tolerance: NonNegativeFloat,
        optimizer: Callable[..., Optimizer],
        classifier_optimizer: Callable[..., Optimizer],
        schedule: Schedule,
    ) -> None:
        super().__init__(
            backbone=backbone,
            num_clusters=num_clusters,
            optimizer=partial(OptimizerPerGroup, makers=(optimizer, classifier_optimizer)),
            schedule=schedule,
            e_step_every_n_epochs=0,  # after the last epoch, no other round begins
        )
        self.decoder = decoder if reconstruction_weight else None
        self.classifier = nn.Sequential(classifier, nn.Linear(classifier.num_features, num_clusters))  # type: ignore[arg-type]
        self.centres = nn.Parameter(torch.zeros(num_clusters, backbone.num_features))  # type: ignore[call-overload]
        self.fuzzifier = fuzzifier
        self.certainty: Certainty = certainty
        self.first_share = first_share
        self.share_growth = share_growth
        self.largest_share = largest_share
        self.least_reliable = least_reliable
        self.label_smoothing = label_smoothing
        self.target_temperature = target_temperature
        self.even = even
        self.min_confidence = min_confidence
        self.alpha = alpha
        self.reconstruction_weight = reconstruction_weight
        self.classifier_epochs = classifier_epochs
        self.epochs_per_round = classifier_epochs + clustering_epochs
        self.stop_below = stop_below
        self.stop_after_rounds = stop_after_rounds
        self.kmeans_restarts = kmeans_restarts
        self.kmeans_max_iterations = kmeans_max_iterations
        self.kmeans_tolerance = kmeans_tolerance
        # What follows is as of the beginning of the round; a resumed run goes on with it.
        self.register_buffer("assignments", torch.zeros(num_images, dtype=torch.int64))
        self.register_buffer("is_reliable", torch.zeros(num_images, dtype=torch.bool))
        self.register_buffer("rounds_begun", torch.zeros((), dtype=torch.int64))
        self.register_buffer("num_changed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("stable_rounds", torch.zeros((), dtype=torch.int64))
        # As of the last epoch of the classifier
        self.register_buffer("targets", torch.zeros(num_images, num_clusters))
        self.register_buffer("confidence", torch.zeros(()))
        self.register_buffer("agreement", torch.zeros(()))

    def start_from(self, earlier: ClusteringMethod) -> None:
        super().start_from(earlier)
        if self.decoder is not None:
            self.load_weights(self.decoder, find_decoder(earlier, autoencoder="autoencoder"))

    # Rounds

    @property
    def trains_classifier(self) -> bool:
        """Whether the current epoch trains the classifier, and not the clustering network."""
        return self.current_epoch % self.epochs_per_round < self.classifier_epochs

    def has_converged(self) -> bool:
        """Return whether there were as many stable rounds in a row as end training."""
        return int(self.stable_rounds) >= self.stop_after_rounds

    def on_train_start(self) -> None:
        if not self.rounds_begun:
            self.require_earlier_run("Self-EvoC clusters the embeddings", stage="autoencoder")
        if self.has_converged():  # a run that was interrupted after its last step
            self.trainer.should_stop = True

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        epoch_in_round = self.current_epoch % self.epochs_per_round
        if epoch_in_round == 0:
            self.run_e_step(self.current_epoch)
            if self.has_converged():
                log.info("stopped: %d images have changed their cluster in the last round", int(self.num_changed))
                self.trainer.should_stop = True  # Lightning takes no step in this epoch
        elif epoch_in_round == self.classifier_epochs:
            self.classify_all_and_renew_targets()

    # Steps 1 and 2: the reliable images

    @torch.no_grad()
    def e_step(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Set the centres, the first time, and choose the reliable images by the embeddings (M, D) of all images."""
        features = features.to(self.weight_dtype)
        if not self.rounds_begun:
            self.set_centres(features, key)
        self.rounds_begun += 1
        memberships = fuzzy_memberships(features, self.centres, fuzzifier=self.fuzzifier)
        self.renew_assignments(memberships.argmax(1))
        share = self.first_share + self.share_growth * int(self.rounds_begun)
        reliable = select_reliable(
            self.assignments,
            measure_certainty(memberships, by=self.certainty),
            share=min(self.largest_share, share),
            least=self.least_reliable,
            num_clusters=self.num_clusters,
        )
        self.is_reliable.copy_(reliable)

    def set_centres(self, features: Tensor, key: tuple[int | str, ...]) -> None:
        """Set the centres by k-means on the embeddings (M, D) of all images, and the target to that of DEC."""
        result = kmeans_on_all_ranks(
            features,
            num_clusters=self.num_clusters,
            metric="euclidean",
            num_restarts=self.kmeans_restarts,
            max_iterations=self.kmeans_max_iterations,
            tolerance=self.kmeans_tolerance,
            key=key,
        )
        self.centres.copy_(result.centroids)
        self.targets.copy_(target_distribution(student_logits(features, self.centres, alpha=self.alpha).softmax(1)))

    def renew_assignments(self, assignments: Tensor) -> None:
        """Set the assignments (M,) of all images, and count how many have changed and the stable rounds so far."""
        is_first = int(self.rounds_begun) == 1  # there is nothing to compare it with
        if not is_first:
            self.num_changed.copy_((assignments != self.assignments).sum())
        is_stable = not is_first and int(self.num_changed) / len(assignments) < self.stop_below
        self.stable_rounds.copy_((self.stable_rounds + 1) * is_stable)
        self.assignments.copy_(assignments)

    # Step 3: the classifier

    def sampling_weights(self) -> Tensor | None:
        """Return weights (M,) that draw the reliable images only, evenly from the clusters, for the classifier."""
        if not self.trains_classifier:
            return None
        counts = torch.bincount(self.assignments[self.is_reliable], minlength=self.num_clusters)
        return self.is_reliable / counts[self.assignments].clamp(min=1)

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        batch.refuse_extra_images("and Self-EvoC has targets only for the images that are clustered")
        clean, augmented = batch.views
        clustering_group, classifier_group = (group["params"] for group in self.parameter_groups())
        if self.trains_classifier:
            terms = self.compute_classifier_term(self.classifier(augmented), self.assignments[batch.indices])
            idle = clustering_group
        else:
            embeddings = self.backbone(clean)
            reconstructions = None if self.decoder is None else self.decoder(embeddings)
            terms = self.compute_terms(embeddings, self.targets[batch.indices], clean, reconstructions)
            idle = classifier_group
        self.leave_untrained(idle)
        factor = distributed.global_mean_factor(clean)
        terms = {name: factor * term for name, term in terms.items()}
        # DDP expects a gradient of every parameter, so those that rest get one of 0.
        first = next(iter(terms))
        terms[first] = terms[first] + 0.0 * torch.stack([p.sum() for p in idle]).sum()
        return terms

    @replayable()
    @full_precision
    def compute_classifier_term(self, logits: Tensor, pseudo_labels: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropy of the classifier's logits (N, K) with the clusters (N,) of the images."""
        return {"classification": cross_entropy(logits, pseudo_labels, label_smoothing=self.label_smoothing)}

    # Step 4: the target

    def classify_all_and_renew_targets(self) -> None:
        """Classify all images without augmentation, and make the target of the logits."""
        started = time.perf_counter()
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        with self.trainer.precision_plugin.forward_context():
            clean_batches = datamodule.clean_batches(datamodule.fit, self.device)
            logits = self.encode_all(clean_batches, len(self.targets), encode=self.classifier)
        self.renew_targets(logits)
        self.e_step_seconds += time.perf_counter() - started

    @torch.no_grad()
    def renew_targets(self, logits: Tensor) -> None:
        """Make the target of the classifier's logits (M, K) for all images, if it is sure of the reliable ones."""
        self.confidence.copy_(logits.softmax(1).amax(1)[self.is_reliable].mean())
        self.agreement.copy_((logits.argmax(1) == self.assignments).float().mean())
        if self.confidence >= self.min_confidence:
            self.targets.copy_(classifier_targets(logits, temperature=self.target_temperature, even=self.even))
        else:
            log.info(
                "round %d: the target stays, for the classifier's mean largest probability on the images that it has "
                "learnt is %.2f, below method.min_confidence=%s",
                *(int(self.rounds_begun), float(self.confidence), self.min_confidence),
            )

    # Step 5: the clustering network

    @replayable()
    def compute_terms(
        self, embeddings: Tensor, targets: Tensor, images: Tensor, reconstructions: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the weighted terms of embeddings (N, D) with targets (N, K), and of images and reconstructions."""
        terms = {"clustering": target_divergence(targets, student_logits(embeddings, self.centres, alpha=self.alpha))}
        if reconstructions is not None:
            terms["reconstruction"] = self.reconstruction_weight * reconstruction_loss(reconstructions, images)
        return terms

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the weights of the clustering network, and those of the classifier."""
        classifier = [p for p in self.classifier.parameters() if p.requires_grad]
        classifier_ids = {id(p) for p in classifier}
        others = [p for p in self.parameters() if p.requires_grad and id(p) not in classifier_ids]
        return [{"params": others}, {"params": classifier}]

    def log_terms(self, terms: dict[str, Tensor], loss: Tensor) -> None:
        super().log_terms(terms, loss)
        self.log("round/changed", self.num_changed / len(self.assignments))
        self.log("round/reliable", self.is_reliable.float().mean())
        self.log("round/confidence", self.confidence)
        self.log("round/agreement", self.agreement)

    # The final clustering

    def e_step_assignments(self) -> Tensor:
        return self.assignments

    def cluster_logits(self, features: Tensor) -> Tensor | None:
        return student_logits(features, self.centres, alpha=self.alpha) if self.rounds_begun else None


@full_precision
def classifier_targets(logits: Tensor, *, temperature: float, even: bool) -> Tensor:
    """Return the target p (M, K), the softmax of logits (M, K) over a temperature.

    If it is to be `even`, columns are divided by their sums, then rows by theirs. Logarithms keep what is very small.
    """
    log_p = (logits / temperature).log_softmax(1)
    if even:
        log_p = log_p - log_p.logsumexp(0)
    return log_p.softmax(1)
