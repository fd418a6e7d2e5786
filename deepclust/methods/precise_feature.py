"""Precise feature: a reconstruction, from its authors' code alone, of clustering by a WGAN-GP and a classifier.

Gan, Dong, Zhou, Gao and Dong ("Learning the precise feature for cluster assignment", IEEE Transactions on Cybernetics
52, 2022, arXiv 2106.06159). The text of the paper was not had. Losses and schedule are those of the authors' code,
which is for MNIST only, and so are the networks on its images; whatever concerns other data sets is a choice of ours.

A generator makes images x_g of noise and a code k, uniform over the K clusters. A critic tells them from real images
x_r. A classifier sees generated images only and learns which code an image was made of; the generator is rewarded if it
can. So each code comes to stand for images that can be told apart, and the classifier's answer on a real image is its
cluster. With L_C the cross-entropy of the codes under the classifier, a bound on the entropy of the code given the
image, the critic, the classifier and the generator minimise

    L_D = mean D(x_g) - mean D(x_r) + w mean (|grad D(x_u)| - 1)^2,   x_u = x_r + e (x_g - x_r), e uniform in [0, 1]
    L_C
    L_G = -mean D(x_g) + a L_C,   a = growth^floor(updates of the generator / every)

each by its own weights only. An iteration is one update of the generator, then n of the critic, each with a new
batch of real images, and m of the classifier; later twice as many of the last two. All draw noise, codes and e anew.

Every optimiser step is one of these updates. One optimiser has all three networks, and a step leaves those that it does
not train as they are, so that Adam does what three Adams with the same numbers would do. The classifier is trained in
the same steps as the critic, because neither depends on what the other has learned since the generator's update. So
whatever counts steps counts updates: checkpoints, accumulated gradients and schedules need nothing of their own.

Differs from the authors' code in:
- Networks. The side of the images, the channels and the widths are free; on 28 x 28 grey images they are theirs.
- Critic. It has one output (theirs: ten, whose mean counts, and of whose sum the gradient is; `critic_outputs`).
- Weight a. It stops at `class_weight_max`. Theirs grows to 198.
- Real images. The generator's step takes a batch of real images and does not look at it.
- Scores. They are those of all images and one-to-one. The authors' are many-to-one purities of batches of 100 images,
  which are higher: 27 % for random clusters.

Logged, each as of its last update; `train/loss` is their sum and says nothing by itself:
- `train/critic`: mean D(x_g) - mean D(x_r), minus an estimate of the distance between generated and real images.
- `train/penalty`: w mean (|grad D| - 1)^2. It stays small.
- `train/classifier`: L_C. log K: the codes do not show in the images; 0: they are told apart without an error.
- `train/realism`: -mean D(x_g), which means something only beside `train/critic`.
- `train/codes`: a L_C in the generator's update.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.backbones.strided_convolutions import ConditionalGenerator
from deepclust.batch import TrainBatch
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.engine.precision import full_precision
from deepclust.engine.randomness import make_generator
from deepclust.errors import InputError
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.one_hot import one_hot_mask
from deepclust.nn.schedules import Schedule
from deepclust.number_types import LARGEST_FLOAT, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

SAMPLES_PER_CLUSTER = 10  # generated images of each code in the report


class PreciseFeature(ClusteringMethod):
    """A generator of images by code, a critic, and a classifier of codes: `backbone` and a linear layer.

    Args (`num_clusters`, `optimizer`, `schedule`: see `ClusteringMethod`):
        backbone: the network of the classifier, from images to features (N, D).
        critic: the network of the critic, from images to features; a linear layer follows.
        generator: from noise (N, noise_size) and one-hot codes (N, K) to images in [0, 1].
        critic_outputs: number of outputs of the critic.
        penalty_weight: weight w of the gradient penalty.
        critic_updates: updates n of the critic in an iteration.
        classifier_updates: updates m of the classifier in an iteration, at most n.
        doubled_from: the iteration (from 0) from which there are twice as many of both; None: never.
        class_weight_growth: what a is multiplied with.
        class_weight_every: after how many updates of the generator.
        class_weight_max: a never exceeds this; None: there is no limit.

    Raises:
        InputError: if the classifier has more updates than the critic.
    """

    num_views = 1

    def __init__(
        self,
        *,
        backbone: nn.Module,
        critic: nn.Module,
        generator: ConditionalGenerator,
        num_clusters: PositiveInt,
        critic_outputs: PositiveInt,
        penalty_weight: NonNegativeFloat,
        critic_updates: PositiveInt,
        classifier_updates: PositiveInt,
        doubled_from: NonNegativeInt | None,
        class_weight_growth: PositiveFloat,
        class_weight_every: PositiveInt,
        class_weight_max: PositiveFloat | None,
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
        if classifier_updates > critic_updates:
            raise InputError(
                f"method.classifier_updates is {classifier_updates}, more than method.critic_updates={critic_updates}",
                expected="at most as many: the classifier is trained in the critic's steps",
                do=f"set method.classifier_updates={critic_updates}",
            )
        self.classifier = make_output_layer(backbone.num_features, num_clusters)  # type: ignore[arg-type]
        self.critic = nn.Sequential(critic, make_output_layer(critic.num_features, critic_outputs))  # type: ignore[arg-type]
        self.generator = generator
        self.penalty_weight = penalty_weight
        self.critic_updates = critic_updates
        self.classifier_updates = classifier_updates
        self.doubled_from = doubled_from
        self.class_weight_growth = class_weight_growth
        self.class_weight_every = class_weight_every
        self.class_weight_max = class_weight_max
        self.latest_terms: dict[str, Tensor] = {}

    # One step: an update of the generator, or one of the critic and perhaps one of the classifier

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        batch.refuse_extra_images("and the codes stand for those that are clustered")
        iteration, update = locate_update(
            self.global_step, critic_updates=self.critic_updates, doubled_from=self.doubled_from
        )
        if update == 0:
            terms = self.generator_terms(batch, generator_update=iteration)
        else:
            _, critic_updates, classifier_updates = self.count_updates(iteration)
            terms = self.critic_and_classifier_terms(
                batch, trains_classifier=update > critic_updates - classifier_updates
            )
        # The mean over the global batch. DDP averages over processes, whose parts of it may differ in size.
        factor = distributed.global_mean_factor(batch.views[0])
        terms = {name: factor * term for name, term in terms.items()}
        self.latest_terms |= {name: term.detach() for name, term in terms.items()}
        return terms

    def count_updates(self, iteration: int) -> tuple[int, int, int]:
        """Return how many updates the generator, the critic and the classifier have in an iteration (from 0)."""
        return count_updates(
            iteration,
            critic_updates=self.critic_updates,
            classifier_updates=self.classifier_updates,
            doubled_from=self.doubled_from,
        )

    def generator_terms(self, batch: TrainBatch, *, generator_update: int) -> dict[str, Tensor]:
        """Return the terms of an update of the generator, of which `generator_update` (from 1) is the number."""
        realism, cross_entropy = self.compute_generator_terms(*self.draw_noise_and_codes(batch, "generator"))
        self.leave_untrained(self.list_parameters(self.critic, self.backbone, self.classifier))
        weight = class_weight(
            generator_update,
            growth=self.class_weight_growth,
            every=self.class_weight_every,
            maximum=self.class_weight_max,
        )
        return {"realism": realism, "codes": weight * cross_entropy}

    def critic_and_classifier_terms(self, batch: TrainBatch, *, trains_classifier: bool) -> dict[str, Tensor]:
        """Return the terms of an update of the critic and, if it is trained too, of the classifier."""
        images, draws = batch.views[0], batch.draws
        mix = torch.rand(
            draws.global_batch_size, generator=draws.make_generator("mix", images.device), device=images.device
        )
        mix = mix[draws.local_rows(len(images))].to(images.dtype)
        noise, codes = self.draw_noise_and_codes(batch, "critic")
        difference, penalty = self.compute_critic_terms(images, noise, codes, mix)
        terms = {"critic": difference, "penalty": self.penalty_weight * penalty}
        untrained = self.list_parameters(self.generator)
        if trains_classifier:
            terms["classifier"] = self.compute_classifier_term(*self.draw_noise_and_codes(batch, "classifier"))
        else:
            untrained += self.list_parameters(self.backbone, self.classifier)
        self.leave_untrained(untrained)
        # DDP expects a gradient of every parameter, so those that are not trained get one of 0.
        terms["critic"] = difference + 0.0 * torch.stack([p.sum() for p in untrained]).sum()
        return terms

    def draw_noise_and_codes(self, batch: TrainBatch, purpose: str) -> tuple[Tensor, Tensor]:
        """Return noise (N, noise_size) and codes (N,) for as many images as the batch has."""
        images, draws = batch.views[0], batch.draws
        noise = draws.normal_like(images.new_empty(len(images), self.generator.noise_size), f"{purpose} noise")
        codes = torch.randint(
            self.num_clusters,
            (draws.global_batch_size,),
            generator=draws.make_generator(f"{purpose} codes", images.device),
            device=images.device,
        )
        return noise, codes[draws.local_rows(len(images))]

    @replayable()
    def compute_generator_terms(self, noise: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return -mean D(x_g) and the cross-entropy of the codes, unweighted, of noise (N, noise_size), codes (N,)."""
        images = self.generate(noise, codes)
        return -self.critic(images).mean(), code_cross_entropy(self.classify(images), codes)

    @replayable()
    def compute_critic_terms(self, real: Tensor, noise: Tensor, codes: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean D(x_g) - mean D(x_r) and the unweighted penalty; `real` are images, `mix` (N,) is e."""
        with torch.no_grad():
            generated = self.generate(noise, codes)
        difference = self.critic(generated).mean() - self.critic(real).mean()
        return difference, gradient_penalty(self.critic, real, generated, mix)

    @replayable()
    def compute_classifier_term(self, noise: Tensor, codes: Tensor) -> Tensor:
        """Return the cross-entropy of the codes (N,) of images that are made of them and of noise (N, noise_size)."""
        with torch.no_grad():
            images = self.generate(noise, codes)
        return code_cross_entropy(self.classify(images), codes)

    def log_terms(self, terms: dict[str, Tensor], loss: Tensor) -> None:
        latest = self.latest_terms | terms
        super().log_terms(latest, torch.stack(list(latest.values())).sum())

    # The networks

    def parameter_groups(self) -> list[dict[str, Any]]:
        # A group for each network, since they take their first steps at different times: torch's fused optimisers
        # begin the state of all weights of a group in the same step.
        networks = (self.generator,), (self.critic,), (self.backbone, self.classifier)
        return [{"params": self.list_parameters(*modules)} for modules in networks]

    @staticmethod
    def list_parameters(*networks: nn.Module) -> list[nn.Parameter]:
        """Return the trainable parameters of some networks."""
        return [p for network in networks for p in network.parameters() if p.requires_grad]

    def compile_networks(self, mode: str) -> None:
        # The penalty needs second derivatives of the critic, which torch.compile does not give.
        self.backbone.compile(mode=mode, dynamic=False)

    def generate(self, noise: Tensor, codes: Tensor) -> Tensor:
        """Return images (N, channels, H, W) of noise (N, noise_size) and codes (N,)."""
        return self.generator(noise, one_hot_mask(codes, self.num_clusters).to(noise.dtype))

    # The final clustering

    def classify(self, images: Tensor) -> Tensor:
        """Return the logits (N, K) of the code of each image."""
        return self.classifier(self.backbone(images))

    def cluster_logits(self, features: Tensor) -> Tensor:
        return self.classifier(features)

    @torch.no_grad()
    def sample_images(self, key: tuple[int | str, ...]) -> Tensor:
        # The same noise for all codes: what a row has in common is its code, and what a column has, its noise.
        noise = torch.randn(SAMPLES_PER_CLUSTER, self.generator.noise_size, generator=make_generator(*key))
        codes = torch.arange(self.num_clusters, device=self.device).repeat_interleave(SAMPLES_PER_CLUSTER)
        noise = noise.to(self.device, self.weight_dtype).repeat(self.num_clusters, 1)
        return self.generate(noise, codes).unflatten(0, (self.num_clusters, SAMPLES_PER_CLUSTER))


# When each network is trained -----------------------------------------------------------------------------------------


def count_updates(
    iteration: int, *, critic_updates: int, classifier_updates: int, doubled_from: int | None
) -> tuple[int, int, int]:
    """Return how many updates the generator, the critic and the classifier have in an iteration (from 0).

    The generator has none in iteration 0.
    """
    factor = 1 if doubled_from is None or iteration < doubled_from else 2
    return min(iteration, 1), factor * critic_updates, factor * classifier_updates


def locate_update(step: int, *, critic_updates: int, doubled_from: int | None) -> tuple[int, int]:
    """Return the iteration of an optimiser step and which of its updates that is, all from 0.

    Update 0 is that of the generator. The critic's follow, with those of the classifier in the last of them.
    """
    place = step + 1  # as if the generator had an update in iteration 0
    length, doubled_length = 1 + critic_updates, 1 + 2 * critic_updates
    if doubled_from is None or place < doubled_from * length:
        return divmod(place, length)
    iterations, update = divmod(place - doubled_from * length, doubled_length)
    return doubled_from + iterations, update


def class_weight(generator_update: int, *, growth: float, every: int, maximum: float | None) -> float:
    """Return the weight a of the codes in an update of the generator (from 1): growth^floor(generator_update / every).

    It is `maximum` at most. In the authors' code it is not determined whether the update itself is counted; here it is.
    """
    limit = LARGEST_FLOAT if maximum is None else maximum
    exponent = generator_update // every
    return limit if exponent * math.log(growth) >= math.log(limit) else growth**exponent


# Losses ---------------------------------------------------------------------------------------------------------------


@full_precision
def code_cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Return the mean cross-entropy, a scalar, of codes (N,) under logits (N, K)."""
    return F.cross_entropy(logits, codes)


@full_precision
def gradient_penalty(critic: Callable[[Tensor], Tensor], real: Tensor, generated: Tensor, mix: Tensor) -> Tensor:
    """Return mean (|grad| - 1)^2 over points between real and generated images (N, ...), a scalar.

    A point is the share `mix` (N,) of the way from the real image to the generated one. The gradient is that of the sum
    of the critic's outputs with respect to the image. WGAN-GP, equation 3.
    """
    mix = mix.reshape(len(real), *[1] * (real.dim() - 1))
    points = (real + mix * (generated - real)).detach().requires_grad_()
    (gradients,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    norms = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return (norms - 1).square().mean()


def make_output_layer(num_inputs: int, num_outputs: int) -> nn.Linear:
    """Return a linear layer whose weights begin as in the authors' code: uniform by Glorot and Bengio, biases 0."""
    layer = nn.Linear(num_inputs, num_outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
