"""Hard regularisation: the step against its equation, counts, priors, the comparisons, and the rule of evaluation."""

import math

import pytest
import torch
from torch import nn

from deepclust.backbones.lenet import LeNet
from deepclust.batch import Draws, TrainBatch
from deepclust.errors import InputError
from deepclust.methods.hard_regularization import HardRegularization, size_divergence, soft_balance_terms

COMPARISONS = ("none", "sinkhorn", "mean_square", "variance", "entropy", "entropy_nearest")


def make_method(num_clusters=3, **settings):
    torch.manual_seed(0)
    backbone = nn.Linear(6, 6)
    backbone.num_features = 6
    arguments = {
        "embedding_size": 4,
        "sigma": 2.0,
        "balance": "log_count",
        "count_over": "batch",
        "prior": None,
        "sinkhorn_epsilon": 0.5,
        "sinkhorn_iterations": 15,
    }
    return HardRegularization(
        backbone=backbone,
        num_clusters=num_clusters,
        optimizer=torch.optim.Adam,
        schedule=lambda step, steps_per_epoch: 1.0,
        **{**arguments, **settings},
    ).double()


def make_batch(size, *, extra=False, seed=0):
    views = torch.randn(size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return TrainBatch((views,), torch.arange(size), Draws(key=(0,), first_row=0, global_batch_size=size), extra)


def slow_step(embeddings, centroids, sigma, log_prior=(0.0,) * 100):
    """Return assignments and loss, number by number."""
    costs = [[sum((a - b) ** 2 for a, b in zip(z, mu, strict=True)) / sigma for mu in centroids] for z in embeddings]
    counts, assigned = [0] * len(centroids), {}
    while len(assigned) < len(costs):
        pairs = ((i, k) for i in range(len(costs)) for k in range(len(counts)) if i not in assigned)
        i, k = min(pairs, key=lambda p: costs[p[0]][p[1]] - log_prior[p[1]] + math.log(counts[p[1]] + 1))
        assigned[i] = k
        counts[k] += 1
    assignments = [assigned[i] for i in range(len(costs))]
    return assignments, sum(costs[i][k] for i, k in enumerate(assignments)) / len(costs)


@pytest.mark.parametrize("size", [1, 2, 20])
def test_a_step_follows_its_equation(size):
    method, batch = make_method(), make_batch(size)
    z = method.encode(batch.views[0])
    assignments, loss = slow_step(z.tolist(), method.centroids.tolist(), 2.0)
    assert method.assign(method.compute_costs(z)).tolist() == assignments
    terms = method.losses(batch)
    assert list(terms) == ["distance"] and float(terms["distance"].detach()) == pytest.approx(loss, rel=1e-12)
    assert method.sizes.tolist() == [assignments.count(k) for k in range(3)]


def test_the_gradient_is_that_of_the_distances_to_the_own_centroids():
    method, batch = make_method(), make_batch(20)
    method.losses(batch)["distance"].backward()
    z = method.encode(batch.views[0]).detach()
    assignments = method.assign(method.compute_costs(z))
    for k in range(3):
        expected = 2 * (method.centroids[k] - z[assignments == k]).sum(0) / 2.0 / 20
        torch.testing.assert_close(method.centroids.grad[k], expected.detach())


def test_counts_last_for_a_batch_or_for_an_epoch():
    of_batch, of_epoch = (make_method(count_over=over) for over in ("batch", "epoch"))
    costs = torch.zeros(2, 3, dtype=torch.float64)
    for method in (of_batch, of_epoch):
        method.sizes.copy_(torch.tensor([4, 0, 2]))
    assert of_batch.assign(costs).tolist() == [0, 1]
    assert of_epoch.assign(costs).tolist() == [1, 1]  # log(1 + 1) < log(2 + 1)
    of_epoch.on_train_epoch_start()
    assert of_epoch.sizes.tolist() == [0, 0, 0] and of_epoch.previous_sizes.tolist() == [4, 0, 2]
    assert of_epoch.assign(costs).tolist() == [0, 1]


def test_a_prior_goes_by_the_sizes_of_the_last_epoch_and_not_by_its_order():
    method, third = make_method(prior=[1.0, 6.0, 3.0]), torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(method.order_prior(), third)  # in the first epoch none is known
    method.previous_sizes.copy_(torch.tensor([5, 1, 9]))
    torch.testing.assert_close(method.order_prior(), torch.tensor([0.3, 0.1, 0.6], dtype=torch.float64))
    z = method.encode(make_batch(20).views[0])
    assignments, _ = slow_step(z.tolist(), method.centroids.tolist(), 2.0, [math.log(p) for p in (0.3, 0.1, 0.6)])
    assert method.assign(method.compute_costs(z)).tolist() == assignments
    equal = torch.zeros(100, 3, dtype=torch.float64)
    assert torch.bincount(method.assign(equal)).tolist() == pytest.approx([30, 10, 60], abs=1)


def test_a_prior_for_another_number_of_clusters_is_refused():
    with pytest.raises(InputError, match="2 shares for 3 clusters"):
        make_method(prior=[0.5, 0.5])


@pytest.mark.parametrize("balance", COMPARISONS)
def test_comparisons_train_network_and_centroids(balance):
    method = make_method(balance=balance)
    terms = method.losses(make_batch(20))
    assert terms.keys() == ({"distance"} if balance in ("none", "sinkhorn") else {"distance", "balance"})
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in method.parameters())
    assert int(method.sizes.sum()) == 20


def test_without_balance_the_nearest_centroid_trains_and_in_evaluation_it_always_decides():
    z = make_method().encode(make_batch(20).views[0])
    for balance in ("none", "log_count"):
        method = make_method(balance=balance)
        nearest = method.compute_costs(z).argmin(1)
        assert torch.equal(method.cluster_logits(z).argmax(1), nearest)
        assert torch.equal(method.assign(method.compute_costs(z)), nearest) == (balance == "none")


def test_sinkhorn_gives_an_image_to_its_likeliest_cluster():
    method = make_method(balance="sinkhorn")
    costs = torch.tensor([[0.0, 5.0, 5.0], [5.0, 0.0, 5.0], [5.0, 5.0, 0.0]], dtype=torch.float64)
    assert method.assign(costs).tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["mean_square", "variance", "entropy", "entropy_nearest"])
def test_soft_terms_have_right_gradients_and_the_least_balance_term_where_means_are_equal(kind):
    costs = (torch.rand(6, 4, dtype=torch.float64) + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: sum(soft_balance_terms(c, kind)), (costs,))
    even = costs.mean().expand(6, 4)
    assert soft_balance_terms(even, kind)[0] < soft_balance_terms(costs, kind)[0]


@pytest.mark.parametrize("balance", ["log_count", *COMPARISONS])
def test_one_cluster_is_always_even_and_its_terms_are_finite(balance):
    method = make_method(num_clusters=1, balance=balance)
    terms = method.losses(make_batch(20))
    assert all(term.isfinite() for term in terms.values())
    if balance in ("variance", "entropy", "entropy_nearest"):  # mean_square also rewards small distances
        assert terms["balance"] == 0
    sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert method.sizes.tolist() == [20] and size_divergence(method.sizes, method.order_prior()) < 1e-6


def test_divergence_of_sizes():
    equal = torch.full((4,), 0.25)
    assert float(size_divergence(torch.tensor([5, 5, 5, 5]), equal)) == pytest.approx(0, abs=1e-6)
    assert float(size_divergence(torch.tensor([9, 0, 0, 0]), equal)) == pytest.approx(math.log(4), abs=1e-6)


def test_extra_images_are_refused():
    with pytest.raises(InputError, match="extra images"):
        make_method().losses(make_batch(4, extra=True))


@pytest.mark.parametrize(("size", "features"), [(16, 16), (28, 256), (32, 400), (64, 2704), (96, 7056)])
def test_lenet_has_the_features_it_says(size, features):
    network = LeNet(channels=1, image_size=size, widths=[6, 16], kernel_size=5, pool_after=[1, 2])
    assert network.num_features == features and network(torch.zeros(2, 1, size, size)).shape == (2, features)


def test_lenet_refuses_images_of_which_nothing_would_be_left():
    with pytest.raises(InputError, match="15 x 15"):
        LeNet(channels=1, image_size=15, widths=[6, 16], kernel_size=5, pool_after=[1, 2])
