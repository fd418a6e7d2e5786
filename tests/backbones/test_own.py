"""A network of one's own as a backbone."""

from torch import nn

from deepclust.backbones.own import OwnNetwork


def test_trying_the_network_leaves_the_mode_of_each_layer() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    network[1].eval()  # frozen statistics
    backbone = OwnNetwork(network=network, in_channels=1, image_size=5)
    assert backbone.num_features == 2 * 3 * 3
    assert [module.training for module in network.modules()] == [True, True, False, True]
