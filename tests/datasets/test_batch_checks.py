"""Batches too small for batch normalisation are refused, where the statistics are of one process or of all."""

import pytest
from torch import nn

from deepclust.datasets.batch_checks import check_batch_statistics
from deepclust.engine.batch_norm import group_batch_norm, synchronise_batch_norm
from deepclust.errors import InputError

PLAIN = nn.Sequential(nn.Linear(2, 2))
NORMALISED = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
SYNCHRONISED = synchronise_batch_norm(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
GROUPED = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
group_batch_norm(GROUPED, 4)


@pytest.mark.parametrize(
    ("network", "sizes", "num_processes"),
    [
        (PLAIN, [1], 1),
        (NORMALISED, [2], 1),
        (NORMALISED, [8, 3], 1),
        (NORMALISED, [4], 2),
        (SYNCHRONISED, [2], 2),
        (GROUPED, [16, 8], 2),
    ],
)
def test_batches_that_are_large_enough(network, sizes, num_processes):
    check_batch_statistics(network, sizes, batch_size=sizes[0], num_processes=num_processes)
    check_batch_statistics(network, [], batch_size=1, num_processes=num_processes)


@pytest.mark.parametrize(
    ("network", "sizes", "num_processes", "message"),
    [
        (NORMALISED, [1], 1, "batch_size is 1, and .*; expected 2 images in a batch at least; set batch_size=2"),
        (NORMALISED, [2], 2, "batch_size is 2 on 2 processes, and .*; expected 4 images .*; set batch_size=4"),
        (NORMALISED, [8, 3], 2, "the last batch of an epoch holds 3 on 2 processes.*; set drop_last=true"),
        (SYNCHRONISED, [1], 1, "batch_size is 1.*set batch_size=2"),
        (GROUPED, [7], 1, "batch_size is 7, and .* in 4 groups; expected 8 .*; set batch_norm_groups=3"),
        (GROUPED, [7], 2, "batch_size is 7 on 2 processes, .*; set batch_norm_groups=2, or batch_size=8"),
        (GROUPED, [3], 2, "batch_size is 3 on 2 processes, .* in 4 groups; .*; set batch_size=8"),
        (GROUPED, [16, 7], 1, "the last batch .* holds 7, and .* in 4 groups; .*groups=3, or drop_last=true"),
    ],
)
def test_batches_that_are_too_small(network, sizes, num_processes, message):
    with pytest.raises(InputError, match=message):
        check_batch_statistics(network, sizes, batch_size=sizes[0], num_processes=num_processes)
