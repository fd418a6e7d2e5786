"""Pretrained weights: read from files, refused if they do not fit, and reported if they cannot be downloaded."""

from urllib.error import URLError

import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch.nn import functional
from torchvision import models

from deepclust.backbones.pretrained import (
    PACKAGED_WEIGHTS,
    find_cached_resnet,
    timm_model,
    torchvision_cache_file,
)
from deepclust.backbones.resnet import ResNet
from deepclust.backbones.stacked import Stacked
from deepclust.errors import InputError


@pytest.fixture(scope="module")
def resnet18_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return models.resnet18().state_dict()


def make_resnet18(weights: str | None, stem: str = "imagenet") -> ResNet:
    return ResNet(depth=18, stem=stem, in_channels=3, weights=weights).eval()


@pytest.mark.parametrize("kind", ["plain.pth", "wrapped.pth", "tensors.safetensors"])
def test_a_network_with_weights_of_a_file_equals_the_one_that_wrote_it(resnet18_weights, tmp_path, kind):
    file = tmp_path / kind
    if kind == "tensors.safetensors":
        save_file(resnet18_weights, file)
    else:
        wrapped = {"state_dict": {f"module.{name}": value for name, value in resnet18_weights.items()}}
        torch.save(wrapped if kind == "wrapped.pth" else resnet18_weights, file)
    expected = models.resnet18()
    expected.load_state_dict(resnet18_weights)
    expected.fc = torch.nn.Identity()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(make_resnet18(str(file))(images), expected.eval()(images))


def test_another_stem_keeps_its_own_weights(resnet18_weights, tmp_path):
    torch.save(resnet18_weights, tmp_path / "w.pth")
    network = make_resnet18(str(tmp_path / "w.pth"), "cifar").network
    assert network.conv1.weight.shape[2:] == (3, 3)
    assert torch.equal(network.layer4[1].conv2.weight, resnet18_weights["layer4.1.conv2.weight"])


def test_weights_that_do_not_fit_are_refused(resnet18_weights, tmp_path):
    torch.save(models.resnet34().state_dict(), tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"weight": tmp_path}, tmp_path / "object.pth")  # unpickling an object calls functions
    (tmp_path / "text.pth").write_text("no")
    for file, message in (
        ("other.pth", "of another network"),
        ("list.pth", "no named tensors"),
        ("object.pth", "no weights can be read"),
        ("text.pth", "no weights can be read"),
        ("none.pth", "it is missing"),
    ):
        with pytest.raises(InputError, match=message):
            make_resnet18(str(tmp_path / file))
    with pytest.raises(InputError, match="IMAGENET1K_V1"):
        make_resnet18("IMAGENET")
    with pytest.raises(InputError, match="timm has no network"):
        timm_model(model_name="resnet1", pretrained=False, weights=None)


def test_the_error_of_a_failed_download_names_the_file_where_weights_are_looked_for(
    resnet18_weights, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def fail_to_connect(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.download_url_to_file", fail_to_connect)
    with pytest.raises(InputError, match=r"cannot be downloaded.*no route.*checkpoints/resnet18-"):
        make_resnet18("IMAGENET1K_V1")
    assert find_cached_resnet() is None
    file = torchvision_cache_file(models.ResNet18_Weights.IMAGENET1K_V1.url)
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert find_cached_resnet() == (18, "IMAGENET1K_V1")


def test_a_failed_download_of_timm_is_reported(monkeypatch):
    def fail_to_connect(*_, **__):
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr(timm, "create_model", fail_to_connect)
    with pytest.raises(InputError, match="weights of resnet10t cannot be downloaded: no route; "):
        timm_model(model_name="resnet10t", pretrained=True, weights=None)


@pytest.mark.parametrize(
    ("channels", "name", "image_size", "flower", "temple"),
    [
        (3, "tf_efficientnet_lite0", 224, 985, 442),
        (1, "tf_efficientnet_lite0", 224, 985, 442),
        (3, "tf_efficientnet_lite2", 260, 599, 698),  # a honeycomb and a palace
    ],
)
def test_packaged_weights_recognise_a_daisy_and_a_bell_cote(channels, name, image_size, flower, temple):
    """This would fail if layers had been given each other's weights."""
    pytest.importorskip(PACKAGED_WEIGHTS[name][0])
    network = timm_model(model_name=name, pretrained=True, weights=None, in_chans=channels).eval()
    for file, label in (("flower.jpg", flower), ("china.jpg", temple)):
        photo = torch.from_numpy(load_sample_image(file)[:, :427] / 255.0).permute(2, 0, 1)[None].float()
        photo = functional.interpolate(photo, size=image_size, mode="bicubic", antialias=True)
        photo = photo if channels == 3 else photo.mean(1, keepdim=True)
        with torch.no_grad():
            assert int(network((photo - 0.5) / 0.5).argmax()) == label


def test_timm_network_with_weights_of_a_file(tmp_path):
    original = timm.create_model("test_resnet")
    torch.save(original.state_dict(), tmp_path / "w.pth")
    network = timm_model(
        model_name="test_resnet", pretrained=False, weights=str(tmp_path / "w.pth"), num_classes=0, in_chans=3
    )
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = original.eval().forward_head(original.forward_features(images), pre_logits=True)
        torch.testing.assert_close(network.eval()(images), expected)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet10t"])
@pytest.mark.parametrize("image_size", [32, 64])
def test_timm_networks_take_the_size_of_the_images(name, image_size):
    network = timm_model(model_name=name, pretrained=False, weights=None, image_size=image_size, num_classes=0)
    assert network(torch.zeros(2, 3, image_size, image_size)).shape == (2, network.num_features)


def test_a_timm_network_of_its_own_size_is_built_as_before():
    torch.manual_seed(0)
    expected = timm.create_model("test_vit", num_classes=0).state_dict()
    size = timm.get_pretrained_cfg("test_vit").input_size[-1]
    torch.manual_seed(0)
    given = timm_model(model_name="test_vit", pretrained=False, weights=None, image_size=size, num_classes=0)
    assert all(torch.equal(value, expected[name]) for name, value in given.state_dict().items())


def test_a_size_that_a_timm_network_does_not_take_is_refused():
    with pytest.raises(InputError, match=r"no images of 8 x 8 pixels; expected 224 x 224.*set dataset\.image_size=224"):
        timm_model(model_name="vit_tiny_patch16_224", pretrained=False, weights=None, image_size=8, num_classes=0)


def test_weights_of_a_file_are_resampled_for_another_size(tmp_path):
    original = timm.create_model("test_vit")
    torch.save(original.state_dict(), tmp_path / "w.pth")
    arguments = {"pretrained": False, "weights": str(tmp_path / "w.pth"), "num_classes": 0}
    network = timm_model(model_name="test_vit", image_size=96, **arguments).eval()
    original.set_input_size(img_size=96)
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        expected = original.eval().forward_head(original.forward_features(images), pre_logits=True)
        torch.testing.assert_close(network(images), expected)


def test_stacked_trains_the_second_network_only():
    class Mean(torch.nn.Module):
        num_features = 4

        def forward(self, x):
            return x.flatten(1)[:, :4] * 2

    stacked = Stacked(first=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(12)), then=Mean())
    stacked.train()
    assert stacked.training and not stacked.first.training and stacked.num_features == 4
    assert not any(p.requires_grad for p in stacked.first.parameters())
    images = torch.rand(3, 3, 2, 2)
    torch.testing.assert_close(stacked(images), 2 * stacked.first(images)[:, :4])
