"""BYOL: the configuration of ProPos without noise and scattering."""

import torch

from deepclust.config.build import build
from deepclust.testing import make_batch
from tests.conftest import compose_train
from tests.methods.test_contract import TrainerStub


class DataModuleStub:
    batches_per_epoch = 7


def test_only_the_alignment_term_is_left():
    cfg = compose_train("method=byol", "dataset=digits", "dataset.num_images=32")
    method = build(cfg.method)
    method._trainer = TrainerStub(method, DataModuleStub())
    views = torch.randn(2, 16, 1, 8, 8)
    terms = method.losses(make_batch(tuple(views), 32))
    assert float(terms["scattering"].detach()) == 0
    alignments = [method.losses(make_batch(tuple(views), 32, seed=seed))["alignment"].detach() for seed in (1, 1)]
    assert torch.isfinite(torch.stack(alignments)).all() and method.noise_std == 0
    assert -2 <= float(alignments[0]) <= 2
