"""StatDEC: assignments and terms against slow versions, statistics that follow the batches, and the E-step."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_t
from torch import nn

from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.cluster_statistics import ClusterStatistics, pool_statistics
from deepclust.clustering.student_assignments import target_distribution, target_divergence
from deepclust.errors import InputError
from deepclust.methods.statdec import StatDEC, describe_statistics, size_aware_logits
from deepclust.nn.schedules import Constant

SIZE, M, K = 3, 40, 4


def make_network(in_features, out_features):
    network = nn.Linear(in_features, out_features)
    network.num_features = out_features
    return network


def make_method(**numbers):
    """Return StatDEC on vectors of five numbers."""
    torch.manual_seed(0)
    arguments = {
        "size_exponent": 0.5,
        "distance_exponent": 3.0,
        "statistics_decay": 0.75,
        "clustering_weight": 0.1,
        "reconstruction_weight": 2.0,
        "consistency_weight": 0.01,
        **numbers,
    }
    return StatDEC(
        backbone=make_network(5, SIZE),
        decoder=make_network(SIZE, 5),
        hidden_size=6,
        num_images=M,
        num_clusters=K,
        variance_floor=1e-4,
        kmeans_restarts=2,
        kmeans_max_iterations=50,
        kmeans_tolerance=0.0,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        schedule=Constant(),
        **arguments,
    )


def make_trained_method(**numbers):
    """Return StatDEC after its first E-step, with contexts that are not 0."""
    method = make_method(**numbers)
    method.e_step(torch.randn(M, SIZE), ("test",))
    nn.init.normal_(method.statistics_network[2].weight)
    return method


def make_batch(images, extra=False):
    return TrainBatch((images,), torch.arange(len(images)), Draws((0,), 0, len(images)), extra)


# The assignments


@pytest.mark.parametrize("distance_exponent", [1.0, 3.0])
def test_assignments_by_hand_weigh_sizes_and_variances(distance_exponent):
    torch.manual_seed(1)
    z = torch.randn(6, SIZE, dtype=torch.float64)
    sizes, means = torch.tensor([5.0, 20.0, 1.0, 14.0]), torch.randn(K, SIZE)
    variances = torch.rand(K, SIZE) + 0.1
    expected = torch.zeros(6, K, dtype=torch.float64)
    for i in range(6):
        for j in range(K):
            scaled = [float((z[i, d] - means[j, d]) ** 2 / variances[j, d]) for d in range(SIZE)]
            width = math.prod(float(v) for v in variances[j])
            kernel = (1 + sum(scaled) / SIZE) ** -distance_exponent
            expected[i, j] = (float(sizes[j]) / M) ** 0.5 / math.sqrt(width) * kernel
    statistics = ClusterStatistics(*(values.double() for values in (sizes, means, variances)))
    logits = size_aware_logits(z, statistics, size_exponent=0.5, distance_exponent=distance_exponent, num_images=M)
    torch.testing.assert_close(logits.softmax(1), expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize("size_exponent", [0.0, 0.5])
def test_a_cluster_without_mass_takes_no_part(size_exponent):
    statistics = ClusterStatistics(torch.tensor([3.0, 0.0]), torch.zeros(2, SIZE), torch.full((2, SIZE), 1e-4))
    z = torch.randn(5, SIZE).requires_grad_()
    logits = size_aware_logits(z, statistics, size_exponent=size_exponent, distance_exponent=3.0, num_images=3)
    q = logits.softmax(1)
    assert logits.isfinite().all() and torch.equal(q[:, 1], torch.zeros(5))
    loss = target_divergence(target_distribution(q.detach()), logits)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()


def test_the_exponent_of_a_density_gives_a_mixture_of_student_distributions():
    z, statistics = (
        torch.randn(5, SIZE, dtype=torch.float64),
        ClusterStatistics(
            torch.tensor([3.0, 1.0]).double(), torch.randn(2, SIZE).double(), torch.rand(2, SIZE).double() + 0.1
        ),
    )
    densities = [
        multivariate_t(mean, np.diag(variance), df=SIZE).logpdf(z)
        for mean, variance in zip(statistics.means.numpy(), statistics.variances.numpy(), strict=True)
    ]
    expected = torch.from_numpy(np.stack(densities, 1)) + (statistics.sizes / 4).log()
    logits = size_aware_logits(z, statistics, size_exponent=1.0, distance_exponent=SIZE, num_images=4)
    torch.testing.assert_close(logits.softmax(1), expected.softmax(1))


# The E-step


def test_the_first_statistics_are_those_of_kmeans_and_later_ones_of_the_soft_assignments():
    method, features = make_method(), torch.randn(M, SIZE)
    assert method.cluster_logits(features) is None
    method.e_step(features, ("test",))
    assert method.sizes.sum() == M and torch.equal(method.sizes, method.sizes.round())
    q = method.cluster_logits(features).softmax(1)
    torch.testing.assert_close(method.targets, target_distribution(q))
    method.e_step(features, ("test",))
    expected = pool_statistics(features, q, variance_floor=1e-4)
    for found, value in zip((method.sizes, method.means, method.variances), expected, strict=True):
        torch.testing.assert_close(found, value)


# One step


def test_terms_are_those_of_the_running_statistics_before_the_step():
    method, images = make_trained_method(), torch.randn(7, 5)
    statistics = method.copy_statistics()
    z = method.backbone(images)
    logits = size_aware_logits(z, statistics, size_exponent=0.5, distance_exponent=3.0, num_images=M)
    contexts = method.statistics_network(describe_statistics(statistics, M))
    reconstructions = torch.stack(
        [method.decoder(z[i] + sum(logits[i].softmax(0)[j] * contexts[j] for j in range(K))) for i in range(7)]
    )
    halves = []
    for rows in (slice(3), slice(3, 7)):
        pooled = pool_statistics(z[rows], logits[rows].softmax(1), variance_floor=1e-4)
        share = (pooled.sizes / len(z[rows])).log()
        described = torch.cat([pooled.means, pooled.variances.log(), share[:, None]], 1)
        halves.append(method.statistics_network(described))
    terms = method.losses(make_batch(images))
    torch.testing.assert_close(terms["reconstruction"], 2 * (reconstructions - images).square().mean())
    torch.testing.assert_close(terms["clustering"], 0.1 * target_divergence(method.targets[:7], logits))
    distances = (halves[0] - halves[1]).square().sum(1)
    torch.testing.assert_close(terms["consistency"], 0.01 * distances.mean())


def test_the_running_statistics_move_towards_those_of_the_batch():
    method, images = make_trained_method(), torch.randn(7, 5)
    before, z = method.copy_statistics(), method.backbone(images)
    q = method.compute_logits(z).softmax(1)
    sum(method.losses(make_batch(images)).values()).backward()  # what it needs has not been changed meanwhile
    pooled = pool_statistics(z, q, variance_floor=1e-4)
    torch.testing.assert_close(method.sizes, 0.75 * before.sizes + 0.25 * pooled.sizes * M / 7)
    torch.testing.assert_close(method.means, 0.75 * before.means + 0.25 * pooled.means)
    torch.testing.assert_close(method.variances, 0.75 * before.variances + 0.25 * pooled.variances)
    assert float(method.sizes.sum()) == pytest.approx(M)


def test_the_decoder_begins_as_that_of_the_auto_encoder():
    method, images = make_method(), torch.randn(6, 5)
    method.e_step(torch.randn(M, SIZE), ("test",))
    reconstruction = method.losses(make_batch(images))["reconstruction"]
    torch.testing.assert_close(reconstruction, 2 * (method.decoder(method.backbone(images)) - images).square().mean())


def test_a_batch_of_one_image_has_an_empty_half_and_finite_gradients():
    method = make_trained_method()
    sum(method.losses(make_batch(torch.randn(1, 5))).values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_errors_say_what_to_start_from():
    method = make_method()
    with pytest.raises(InputError, match="start and before are null"):
        method.on_train_start()
    with pytest.raises(InputError, match="extra images"):
        method.losses(make_batch(torch.randn(4, 5), extra=True))
    earlier = make_method()
    nn.init.ones_(earlier.decoder.weight)
    method.start_from(earlier)
    assert torch.equal(method.decoder.weight, earlier.decoder.weight)
    method.on_train_start()
    without_decoder = make_method(reconstruction_weight=0.0)
    with pytest.raises(InputError, match="no decoder to train on"):
        method.start_from(without_decoder)
    without_decoder.start_from(without_decoder)  # as the error advises


def test_without_a_reconstruction_weight_there_is_no_decoder():
    method = make_trained_method(reconstruction_weight=0.0)
    assert set(method.losses(make_batch(torch.randn(4, 5)))) == {"clustering", "consistency"}
    assert not any(name.startswith("decoder") for name, _ in method.named_parameters())
