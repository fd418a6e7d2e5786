"""Target networks: where they start and how they follow the online network."""

import pytest
import torch
from torch import nn

from deepclust.backbones.identity import Identity
from deepclust.errors import InputError
from deepclust.nn.ema import TargetNetwork, make_target, update_target


def make_networks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), nn.Linear(5, 4)


def test_target_starts_as_a_copy_that_takes_no_gradient():
    backbone, projector = make_networks()
    target = TargetNetwork(backbone, projector)
    images = torch.randn(6, 3)
    expected = nn.functional.normalize(projector(backbone(images)), dim=1)
    embeddings = target(images)
    torch.testing.assert_close(embeddings, expected)
    assert not embeddings.requires_grad and not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in (*backbone.parameters(), *projector.parameters()))


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_target_follows_parameters_and_leaves_running_statistics(decay):
    backbone, projector = make_networks()
    target = TargetNetwork(backbone, projector)
    before = [p.clone() for p in target.parameters()]
    with torch.no_grad():
        for p in (*backbone.parameters(), *projector.parameters()):
            p.add_(torch.randn_like(p))
    backbone[1].running_mean.fill_(7.0)
    target.update(backbone, projector, decay=decay)
    online = (*backbone.parameters(), *projector.parameters())
    for p, p_before, p_online in zip(target.parameters(), before, online, strict=True):
        torch.testing.assert_close(p.data, decay * p_before + (1 - decay) * p_online.data)
    assert not target.backbone[1].running_mean.any()


def test_update_of_a_single_network():
    online = nn.Linear(2, 2)
    target = make_target(online)
    with torch.no_grad():
        online.weight.fill_(1.0)
        target.weight.fill_(0.0)
    update_target(target, online, 0.75)
    assert torch.equal(target.weight, torch.full((2, 2), 0.25))


def test_a_backbone_without_weights_is_refused():
    with pytest.raises(InputError, match="Identity has no weights"):
        TargetNetwork(Identity(in_channels=3, image_size=1), nn.Linear(3, 4))
