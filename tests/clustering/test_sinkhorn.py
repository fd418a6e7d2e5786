"""Sinkhorn's iterations against the scaling of exponentials, and where these have no digits left."""

import pytest
import torch

from deepclust.clustering.sinkhorn import sinkhorn_assignments


@pytest.mark.parametrize("shape", [(1, 3), (8, 3), (3, 8), (6, 1)])
def test_it_scales_columns_and_rows_in_turn(shape):
    scores = torch.randn(shape, dtype=torch.float64)
    plan = (scores / 0.7).softmax(1)
    for _ in range(4):
        plan = plan / plan.sum(0)
        plan = plan / plan.sum(1, keepdim=True)
    torch.testing.assert_close(sinkhorn_assignments(scores, epsilon=0.7, iterations=4), plan)


def test_clusters_are_even_after_many_iterations_even_where_exponentials_would_vanish():
    scores = torch.randn(12, 4, dtype=torch.float64)
    scores[:, 0] += 5
    scores[:6] -= 1e5
    plan = sinkhorn_assignments(scores, epsilon=0.5, iterations=300)
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 3.0, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(plan.sum(1), torch.ones(12, dtype=torch.float64))
