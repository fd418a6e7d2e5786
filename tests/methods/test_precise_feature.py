"""Precise feature: its updates against three optimisers in the authors' order, the penalty, and the schedule."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepclust.backbones.strided_convolutions import ConditionalGenerator, StridedConvNet
from deepclust.batch import Draws, TrainBatch
from deepclust.engine import distributed
from deepclust.errors import InputError
from deepclust.methods.precise_feature import (
    PreciseFeature,
    class_weight,
    count_updates,
    gradient_penalty,
    locate_update,
)
from deepclust.nn.schedules import Constant

K, BATCH = 3, 5
ADAM = partial(torch.optim.Adam, lr=1e-2, betas=(0.5, 0.9), weight_decay=0.1)


def make_method(**numbers):
    torch.manual_seed(0)
    sizes = {"channels": 1, "image_size": 4, "widths": [2]}
    arguments = {
        "critic_updates": 3,
        "classifier_updates": 2,
        "doubled_from": 2,
        "class_weight_growth": 1.5,
        "class_weight_every": 2,
        "class_weight_max": 10.0,
        **numbers,
    }
    return PreciseFeature(
        backbone=StridedConvNet(**sizes),
        critic=StridedConvNet(**sizes),
        generator=ConditionalGenerator(noise_size=4, num_clusters=K, **sizes),
        num_clusters=K,
        critic_outputs=2,
        penalty_weight=10.0,
        optimizer=ADAM,
        schedule=Constant(),
        **arguments,
    ).double()


def make_batch(step):
    images = torch.rand(BATCH, 1, 4, 4, generator=torch.Generator().manual_seed(step)).double()
    return TrainBatch((images,), torch.arange(BATCH), Draws((0, step), 0, BATCH))


class TrainerStub:
    def __init__(self, method):
        self.lightning_module, self.global_step = method, 0


def train(method, num_steps):
    """Do what Lightning does in each step with the one optimiser of the method."""
    method._trainer = TrainerStub(method)
    optimizer = ADAM(method.parameter_groups())
    for step in range(num_steps):
        method._trainer.global_step = step
        optimizer.zero_grad()
        sum(method.losses(make_batch(step)).values()).backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()


def train_by_three_optimisers(method, num_iterations):
    """Train in the order of the authors' script, with an optimiser for each network; return how many steps that is."""
    classifier = [*method.backbone.parameters(), *method.classifier.parameters()]
    networks = {"generator": method.generator.parameters(), "critic": method.critic.parameters()}
    optimizers = {name: ADAM(list(ps)) for name, ps in {**networks, "classifier": classifier}.items()}

    def update(name, loss):
        method.zero_grad()
        loss.backward()
        optimizers[name].step()

    step = 0
    for iteration in range(num_iterations):
        factor = 2 if iteration >= 2 else 1
        if iteration:
            noise, codes = method.draw_noise_and_codes(make_batch(step), "generator")
            images = method.generate(noise, codes)
            realism, cross_entropy = -method.critic(images).mean(), F.cross_entropy(method.classify(images), codes)
            update("generator", realism + 1.5 ** (iteration // 2) * cross_entropy)
            step += 1
        critic_steps = range(step, step + factor * 3)
        for step in critic_steps:
            batch = make_batch(step)
            generated = method.generate(*method.draw_noise_and_codes(batch, "critic")).detach()
            mix = torch.rand(BATCH, generator=batch.draws.make_generator("mix")).double()
            difference = method.critic(generated).mean() - method.critic(batch.views[0]).mean()
            penalty = gradient_penalty(method.critic, batch.views[0], generated, mix)
            update("critic", difference + 10 * penalty)
        for step in critic_steps[-factor * 2 :]:
            noise, codes = method.draw_noise_and_codes(make_batch(step), "classifier")
            images = method.generate(noise, codes).detach()
            update("classifier", F.cross_entropy(method.classify(images), codes))
        step += 1
    return step


def test_one_optimiser_learns_what_three_learn():
    expected, method = make_method(), make_method()
    num_steps = train_by_three_optimisers(expected, 5)
    assert num_steps == 3 + 4 + 3 * 7
    train(method, num_steps)
    for (name, p), q in zip(method.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    untrained = make_method().state_dict()
    unchanged = {name for name, value in method.state_dict().items() if torch.equal(value, untrained[name])}
    assert unchanged == {"critic.1.bias"}, "it cancels in the difference of the means"


def test_every_update_trains_its_own_networks():
    method = make_method(critic_updates=2, classifier_updates=1, doubled_from=None)
    trained = []
    for num_steps in range(7):
        before = make_method(critic_updates=2, classifier_updates=1, doubled_from=None)
        train(before, num_steps)
        after = make_method(critic_updates=2, classifier_updates=1, doubled_from=None)
        train(after, num_steps + 1)
        old = before.state_dict()
        trained.append({n.split(".")[0] for n, value in after.state_dict().items() if not torch.equal(value, old[n])})
    critic, classifier, generator = {"critic"}, {"critic", "backbone", "classifier"}, {"generator"}
    assert trained == [critic, classifier, generator, critic, classifier, generator, critic]
    assert {id(p) for group in method.parameter_groups() for p in group["params"]} == set(map(id, method.parameters()))


@pytest.mark.parametrize("step", [0, 2, 3])  # of the critic, of critic and classifier, of the generator
def test_gradients_of_uneven_shares_of_a_batch_average_to_those_of_the_whole(step, monkeypatch):
    method, whole = make_method(), make_batch(0).views[0]
    method._trainer = TrainerStub(method)
    method._trainer.global_step = step

    def compute_gradients(images, first_row, factor):
        monkeypatch.setattr(distributed, "global_mean_factor", lambda rows: factor)
        method.zero_grad()
        draws = Draws((0, 7), first_row, BATCH)
        sum(method.losses(TrainBatch((images,), torch.arange(len(images)), draws)).values()).backward()
        return [p.grad.clone() for p in method.parameters()]

    expected = compute_gradients(whole, 0, 1.0)
    shares = [compute_gradients(whole[:2], 0, 2 * 2 / BATCH), compute_gradients(whole[2:], 2, 2 * 3 / BATCH)]
    for gradient, first, second in zip(expected, *shares, strict=True):
        torch.testing.assert_close((first + second) / 2, gradient)


# The schedule


def test_steps_go_through_the_updates_of_each_iteration():
    numbers = {"critic_updates": 2, "doubled_from": 2}
    places = [locate_update(step, **numbers) for step in range(15)]
    assert places == [
        *[(0, 1), (0, 2)],
        *[(1, 0), (1, 1), (1, 2)],
        *[(2, 0), (2, 1), (2, 2), (2, 3), (2, 4)],
        *[(3, 0), (3, 1), (3, 2), (3, 3), (3, 4)],
    ]
    counts = [count_updates(i, classifier_updates=1, **numbers) for i in range(4)]
    assert counts == [(0, 2, 1), (1, 2, 1), (1, 4, 2), (1, 4, 2)]
    assert locate_update(100, critic_updates=2, doubled_from=None) == divmod(101, 3)
    assert locate_update(0, critic_updates=2, doubled_from=0) == (0, 1)


def test_the_weight_of_the_codes_grows_up_to_a_limit():
    weigh = partial(class_weight, growth=1.2, every=30)
    assert weigh(29, maximum=None) == 1
    assert weigh(30, maximum=None) == 1.2
    assert weigh(89, maximum=None) == 1.2**2
    assert weigh(89, maximum=1.3) == 1.3
    assert weigh(10**9, maximum=10.0) == 10
    assert weigh(10**9, maximum=None) < float("inf")
    assert class_weight(10**9, growth=0.5, every=1, maximum=10.0) == 0


def test_more_updates_of_the_classifier_than_of_the_critic_are_refused():
    with pytest.raises(InputError, match=r"set method\.classifier_updates=3"):
        make_method(classifier_updates=4)


# The penalty


def test_penalty_is_that_of_gradients_taken_one_by_one():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    real, generated = torch.rand(2, 5, 4, dtype=torch.float64)
    mix = torch.rand(5, dtype=torch.float64)
    total = 0.0
    for x, g, e in zip(real, generated, mix, strict=True):
        point, step = x + e * (g - x), 1e-6
        slopes = []
        for i in range(4):
            shift = step * torch.eye(4, dtype=torch.float64)[i]
            slopes.append((critic(point + shift).sum() - critic(point - shift).sum()) / (2 * step))
        total += (torch.stack(slopes).square().sum().sqrt() - 1) ** 2 / 5
    torch.testing.assert_close(gradient_penalty(critic, real, generated, mix), total, rtol=1e-6, atol=1e-8)


def test_penalty_of_a_critic_without_slope_has_a_finite_gradient():
    critic = nn.Linear(4, 1)
    nn.init.zeros_(critic.weight)
    penalty = gradient_penalty(critic, torch.rand(3, 4), torch.rand(3, 4), torch.rand(3))
    penalty.backward()
    assert penalty == 1 and critic.weight.grad.isfinite().all()


# What is shown


def test_samples_of_a_cluster_share_its_code_and_depend_on_the_key():
    method = make_method()
    samples = method.sample_images(("a",))
    assert samples.shape[0] == K and samples.shape[2:] == (1, 4, 4)
    assert torch.equal(samples, method.sample_images(("a",)))
    assert not torch.equal(samples, method.sample_images(("b",)))
    with torch.no_grad():
        method.generator.input.weight[:, 4:] = 0  # then codes do not show
    samples = method.sample_images(("a",))
    assert torch.allclose(samples[0], samples[1]) and not torch.allclose(samples[:, 0], samples[:, 1])


def test_logged_terms_are_those_of_the_last_update_of_each_network():
    method = make_method()
    train(method, 4)
    assert set(method.latest_terms) == {"critic", "penalty", "classifier", "realism", "codes"}
