"""Data sets with a configuration of their own, on small arrays in the layout of the real ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from deepclust.datasets.image_sources import ArraySource, FileSource, ImageSource
from deepclust.datasets.named_datasets import (
    SUPERCLASSES,
    cifar100_superclass,
    load_arrays,
    load_cifar20,
    load_class_folders,
    load_embedded_digits,
)
from deepclust.datasets.one_time_conversion import from_torchvision
from deepclust.errors import InputError

CONF = Path(__file__).parents[2] / "conf" / "dataset"
COUNTS = {"train": 7, "test": 4, "unlabeled": 9}
ARGUMENTS = {"extra": [], "channels": 3, "num_classes": 10, "make": None}


def write_arrays(folder: Path, *, size: int = 6, channels: int = 3, classes: int = 10) -> dict[str, np.ndarray]:
    """Write a data set of random images; return the images by split."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = {}
    for split, count in COUNTS.items():
        images[split] = rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
        np.save(folder / f"{split}_images.npy", images[split])
        if split != "unlabeled":
            np.save(folder / f"{split}_labels.npy", np.arange(count) % classes)
    (folder / "class_names.json").write_text(json.dumps([f"class {k}" for k in range(classes)]))
    return images


def read_all(source: ImageSource) -> np.ndarray:
    return source.read(np.arange(len(source))).permute(0, 2, 3, 1).numpy()


def test_merged_protocol(tmp_path: Path):
    images = write_arrays(tmp_path / "set")
    data = load_arrays(folder=str(tmp_path / "set"), fit=["train", "test"], evaluate=None, **ARGUMENTS)
    assert (read_all(data.fit) == np.concatenate([images["train"], images["test"]])).all()
    assert data.evaluation is data.fit and data.extra is None and data.paths is None
    assert data.labels is not None and data.labels.dtype == np.int64
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    assert data.class_names == [f"class {k}" for k in range(10)]


def test_split_protocol(tmp_path: Path):
    images = write_arrays(tmp_path / "set")
    arguments = {**ARGUMENTS, "extra": ["unlabeled"]}
    data = load_arrays(folder=str(tmp_path / "set"), fit=["train"], evaluate=["test"], **arguments)
    assert data.extra is not None and data.labels is not None
    assert (read_all(data.fit) == images["train"]).all()
    assert (read_all(data.evaluation) == images["test"]).all()
    assert (read_all(data.extra) == images["unlabeled"]).all()
    assert data.labels.tolist() == [0, 1, 2, 3]


def test_evaluating_the_fitted_splits_is_the_merged_protocol(tmp_path: Path):
    write_arrays(tmp_path / "set")
    data = load_arrays(folder=str(tmp_path / "set"), fit=["train"], evaluate=["train"], **ARGUMENTS)
    assert data.evaluation is data.fit


def test_images_are_memory_mapped(tmp_path: Path):
    write_arrays(tmp_path / "set")
    data = load_arrays(folder=str(tmp_path / "set"), fit=["train"], evaluate=None, **ARGUMENTS)
    assert isinstance(data.fit, ArraySource) and all(isinstance(a, np.memmap) for a in data.fit.joined.arrays)


def test_grey_images_serve_as_colour_but_not_the_reverse(tmp_path: Path):
    grey = write_arrays(tmp_path / "grey", channels=1)
    write_arrays(tmp_path / "colour")
    data = load_arrays(folder=str(tmp_path / "grey"), fit=["train"], evaluate=None, **ARGUMENTS)
    assert (read_all(data.fit) == np.repeat(grey["train"], 3, axis=3)).all()
    with pytest.raises(InputError, match=r"dataset\.channels=3"):
        load_arrays(folder=str(tmp_path / "colour"), fit=["train"], evaluate=None, **{**ARGUMENTS, "channels": 1})


def test_labels_may_be_missing_only_without_num_classes(tmp_path: Path):
    write_arrays(tmp_path / "set")
    for split in ("train", "test"):
        (tmp_path / "set" / f"{split}_labels.npy").unlink()
    (tmp_path / "set" / "class_names.json").unlink()
    arguments = {**ARGUMENTS, "num_classes": None}
    data = load_arrays(folder=str(tmp_path / "set"), fit=["train"], evaluate=None, **arguments)
    assert data.labels is None and data.class_names is None
    with pytest.raises(InputError, match=r"train_labels\.npy is missing"):
        load_arrays(folder=str(tmp_path / "set"), fit=["train"], evaluate=None, **ARGUMENTS)


def overwrite_with(value: object):
    return lambda file: np.save(file, value)  # type: ignore[arg-type]


IMAGES = np.zeros((7, 6, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train_images.npy", Path.unlink, "train_images.npy is missing"),
        (
            "train_images.npy",
            overwrite_with(IMAGES.astype(np.float32)),
            r"holds float32 \(7, 6, 6, 3\); expected uint8",
        ),
        ("train_images.npy", overwrite_with(IMAGES[..., 0]), r"holds uint8 \(7, 6, 6\)"),
        ("train_images.npy", overwrite_with(IMAGES[:, :, :, :2]), r"holds uint8 \(7, 6, 6, 2\)"),
        ("train_images.npy", overwrite_with(IMAGES[:0]), r"holds uint8 \(0, 6, 6, 3\)"),
        ("test_images.npy", overwrite_with(IMAGES[:, :5]), "images of 5 x 6 x 3; expected 6 x 6 x 3"),
        (
            "train_images.npy",
            lambda f: f.write_bytes(f.read_bytes()[:300]),
            "train_images.npy cannot be read",
        ),
        ("train_images.npy", lambda f: f.write_bytes(b""), "train_images.npy cannot be read"),
        ("train_images.npy", lambda f: f.write_text("text"), "train_images.npy cannot be read"),
        ("train_labels.npy", Path.unlink, r"train_labels.npy is missing; expected int64 \(7,\)"),
        ("train_labels.npy", overwrite_with(np.arange(6)), r"are int64 \(6,\); expected int64 \(7,\)"),
        ("train_labels.npy", overwrite_with(np.zeros(7)), r"are float64 \(7,\)"),
        ("test_labels.npy", overwrite_with(np.array([0, 1, 2, 10])), "go from 0 to 10; expected classes from 0 to 9"),
        ("test_labels.npy", overwrite_with(np.array([0, 1, 2, -2])), "go from -2 to 2"),
        ("class_names.json", lambda f: f.write_text('["a"]'), "holds 1 names; expected .* 10 classes"),
        ("class_names.json", lambda f: f.write_text("{"), "holds no list of names"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, damage, message: str):
    write_arrays(tmp_path / "set")
    damage(tmp_path / "set" / name)
    with pytest.raises(InputError, match=message) as caught:
        load_arrays(folder=str(tmp_path / "set"), fit=["train", "test"], evaluate=None, **ARGUMENTS)
    assert str(tmp_path / "set" / name) in str(caught.value)


def test_unknown_labels_are_allowed(tmp_path: Path):
    write_arrays(tmp_path / "set")
    np.save(tmp_path / "set" / "train_labels.npy", np.array([-1, 0, 1, 2, 3, 4, -1]))
    data = load_arrays(folder=str(tmp_path / "set"), fit=["train"], evaluate=None, **ARGUMENTS)
    assert data.labels is not None and data.labels.tolist() == [-1, 0, 1, 2, 3, 4, -1]


def test_a_missing_folder_is_made_once(tmp_path: Path):
    filled_folders = []

    def make(work: Path) -> None:
        filled_folders.append(work)
        work.rmdir()
        write_arrays(work)

    arguments = {**ARGUMENTS, "make": make}
    for _ in range(2):
        data = load_arrays(folder=str(tmp_path / "data" / "set"), fit=["train"], evaluate=None, **arguments)
        assert len(data.fit) == COUNTS["train"]
    assert len(filled_folders) == 1 and filled_folders[0] != tmp_path / "data" / "set"


def test_the_error_for_a_missing_folder_names_the_files_to_put_there(tmp_path: Path):
    folder = tmp_path / "cifar10"
    with pytest.raises(InputError) as caught:
        load_arrays(folder=str(folder), fit=["train"], evaluate=["test"], **ARGUMENTS)
    message = str(caught.value)
    assert message.startswith(
        f"{folder} is missing; expected train_images.npy, test_images.npy (uint8, M x H x W x 3), "
    )
    assert "test_labels.npy (int64) and class_names.json in it; put these files there" in message

    def make(work: Path) -> None:
        splits = {"train": {"train": True}}
        from_torchvision(work, dataset="CIFAR10", splits=splits, root=str(tmp_path), download=False)

    with pytest.raises(InputError, match=r"train_images\.npy.*dataset\.download=true, or put these files there"):
        load_arrays(folder=str(folder), fit=["train"], evaluate=None, **{**ARGUMENTS, "make": make})
    assert not folder.exists()


# CIFAR-20 and digits ----------------------------------------------------------------------------------------

HIERARCHY = """
beaver dolphin otter seal whale
aquarium_fish flatfish ray shark trout
orchid poppy rose sunflower tulip
bottle bowl can cup plate
apple mushroom orange pear sweet_pepper
clock keyboard lamp telephone television
bed chair couch table wardrobe
bee beetle butterfly caterpillar cockroach
bear leopard lion tiger wolf
bridge castle house road skyscraper
cloud forest mountain plain sea
camel cattle chimpanzee elephant kangaroo
fox porcupine possum raccoon skunk
crab lobster snail spider worm
baby boy girl man woman
crocodile dinosaur lizard snake turtle
hamster mouse rabbit shrew squirrel
maple_tree oak_tree palm_tree pine_tree willow_tree
bicycle bus motorcycle pickup_truck train
lawn_mower rocket streetcar tank tractor
"""


def test_superclasses_follow_the_published_hierarchy():
    rows = [line.split() for line in HIERARCHY.strip().splitlines()]
    classes = sorted(name for row in rows for name in row)
    assert len(classes) == len(set(classes)) == 100 and len(rows) == len(SUPERCLASSES) == 20
    expected = [next(k for k, row in enumerate(rows) if name in row) for name in classes]
    assert cifar100_superclass(np.arange(100)).tolist() == expected
    assert np.bincount(expected).tolist() == [5] * 20
    assert cifar100_superclass(np.array([-1, 0])).tolist() == [-1, 4]


def test_cifar20_is_loaded_from_its_own_folder_or_from_cifar100(tmp_path: Path):
    own, fine = tmp_path / "cifar20", tmp_path / "cifar100"
    images = write_arrays(fine, classes=100)
    arguments = {"folder": str(own), "cifar100": str(fine), "fit": ["train", "test"], "evaluate": None}
    data = load_cifar20(**arguments, channels=3, make=None)
    assert data.labels is not None and data.class_names == list(SUPERCLASSES)
    assert data.labels.tolist() == cifar100_superclass(np.array([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3])).tolist()
    assert (read_all(data.fit) == np.concatenate([images["train"], images["test"]])).all()
    write_arrays(own, classes=20)
    data = load_cifar20(**arguments, channels=3, make=None)
    assert data.labels is not None and data.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    assert data.class_names == [f"class {k}" for k in range(20)]


def test_embedded_digits():
    data = load_embedded_digits()
    assert len(data.fit) == 1797 and data.fit.shape == (8, 8, 1) and data.evaluation is data.fit
    assert data.labels is not None and data.labels.dtype == np.int64
    assert np.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    pixels = read_all(data.fit)
    assert pixels.min() == 0 and pixels.max() == 255 and len(np.unique(pixels)) == 17
    assert np.round(pixels.mean() / 255, 4) == 0.3053 and np.round(pixels.std() / 255, 4) == 0.3759


# Image files that are not converted -------------------------------------------------------------------------


def write_class_folders(root: Path) -> None:
    for split, counts in (("train", [2, 3]), ("val", [1, 1])):
        for label, count in enumerate(counts):
            (root / split / f"n{label}").mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 7), (label, i, 0)).save(root / split / f"n{label}" / f"{i}.JPEG", quality=100)


def load_image_files(tmp_path: Path, **changes):
    arguments = {
        "folder": str(tmp_path / "data" / "imagenet"),
        "root": str(tmp_path / "originals"),
        "fit": ["train"],
        "evaluate": ["val"],
        "image_size": 5,
        "channels": 3,
        "num_classes": 2,
        "num_workers": 2,
    }
    return load_class_folders(**{**arguments, **changes})


def test_class_folders_are_not_converted(tmp_path: Path):
    write_class_folders(tmp_path / "originals")
    data = load_image_files(tmp_path)
    assert isinstance(data.fit, FileSource) and (len(data.fit), len(data.evaluation)) == (5, 2)
    assert data.labels.tolist() == [0, 1] and data.class_names == ["n0", "n1"]
    assert data.paths == [str(tmp_path / "originals" / "val" / f"n{k}" / "0.JPEG") for k in range(2)]
    assert read_all(data.fit).shape == (5, 5, 5, 3)
    (tmp_path / "originals" / "train" / "n0" / "new.JPEG").write_bytes(b"")
    assert len(load_image_files(tmp_path).fit) == 5, "the list of files is kept"
    merged = load_image_files(tmp_path, evaluate=None)
    assert merged.evaluation is merged.fit and merged.labels.tolist() == [0, 0, 1, 1, 1]


def test_class_folders_are_searched_again_under_another_root(tmp_path: Path):
    write_class_folders(tmp_path / "originals")
    load_image_files(tmp_path)
    (tmp_path / "originals").rename(tmp_path / "moved")
    data = load_image_files(tmp_path, root=str(tmp_path / "moved"))
    assert data.paths[0].startswith(str(tmp_path / "moved"))
    with pytest.raises(InputError, match=r"dataset\.root=DIR"):
        load_image_files(tmp_path, root=None)


def test_the_images_are_kept_where_the_list_would_take_their_place(tmp_path: Path):
    """As with `data_dir=data dataset.root=data/imagenet`."""
    write_class_folders(tmp_path / "data" / "imagenet")
    before = sorted((tmp_path / "data" / "imagenet").rglob("*"))
    with pytest.raises(InputError, match=r"imagenet would be replaced and holds train, val,.*set another data_dir=DIR"):
        load_image_files(tmp_path, root=str(tmp_path / "data" / "imagenet"))
    assert sorted((tmp_path / "data" / "imagenet").rglob("*")) == before
    assert (
        len(load_image_files(tmp_path, folder=str(tmp_path / "other"), root=str(tmp_path / "data/imagenet")).fit) == 5
    )


def test_splits_with_different_class_folders_are_refused(tmp_path: Path):
    write_class_folders(tmp_path / "originals")
    (tmp_path / "originals" / "val" / "n1").rename(tmp_path / "originals" / "val" / "n2")
    with pytest.raises(InputError, match=r"val and train .* different names"):
        load_image_files(tmp_path)


# Configurations ---------------------------------------------------------------------------------------------


def dataset_config(name: str, data_dir: Path) -> DictConfig:
    config = OmegaConf.load(CONF / f"{name}.yaml")
    if "dataset" not in config:
        config = OmegaConf.create({"dataset": config})
    config.data_dir = str(data_dir)
    assert isinstance(config, DictConfig)
    return config


NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
KEYS = {
    "name",
    "num_classes",
    "num_clusters",
    "num_images",
    "image_size",
    "channels",
    "mean",
    "std",
    "stem",
    "source",
}


@pytest.mark.parametrize("name", NAMES)
def test_configurations_have_the_same_keys(name: str, tmp_path: Path):
    dataset = dataset_config(name, tmp_path).dataset
    assert set(dataset) >= KEYS and set(dataset) - KEYS <= {
        "root",
        "download",
        "path",
        "labelled",
        "value_ranges",
        "max_megapixels",
        "standardize",
        "keep",
        "stored_size",
        "image_extension",
        "label_extension",
        "image_column",
        "label_column",
        "subset",
        "revision",
    }
    assert dataset.num_images is None
    if name not in ("features", "graph"):
        assert dataset.name == name and len(dataset.mean) == len(dataset.std) == (dataset.channels or 1)
        assert all(0 < value < 1 for value in [*dataset.mean, *dataset.std])
    if name != "folder":
        assert dataset.num_clusters == dataset.num_classes


NOT_ARRAYS = {"digits", "folder", "arrays", "features", "graph", "imagenet", "webdataset", "huggingface"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - NOT_ARRAYS))
def test_configurations_load_arrays(name: str, tmp_path: Path):
    config = dataset_config(name, tmp_path)
    dataset = config.dataset
    write_arrays(Path(dataset.source.folder), size=8, channels=dataset.channels, classes=dataset.num_classes)
    data = instantiate(dataset.source)
    merged = dataset.source.fit == ["train", "test"]
    assert len(data.fit) == (11 if merged else 7) and data.evaluation is data.fit
    assert len(data.labels) == len(data.fit) and len(data.class_names) == dataset.num_classes
    assert (data.extra is not None) == (name == "stl10")
    make = dataset.source.make
    if "classes" in make and make.classes is not None:
        assert list(make.classes) == sorted(make.classes) and len(make.classes) == dataset.num_classes
    config.dataset.source.update({"fit": ["train"], "evaluate": ["test"]})
    data = instantiate(dataset.source)
    assert (len(data.fit), len(data.evaluation), len(data.labels)) == (7, 4, 4)


@pytest.mark.parametrize("name", ["mnist", "cifar20", "stl10", "imagenet10", "tiny_imagenet", "imagenet"])
def test_configurations_without_data_give_advice(name: str, tmp_path: Path):
    with pytest.raises(Exception) as caught:
        instantiate(dataset_config(name, tmp_path).dataset.source)
    error = caught.value.__cause__
    assert isinstance(error, InputError)
    assert ("dataset.root=DIR" if "imagenet" in name else "dataset.download=true") in str(error)


def test_configuration_of_digits(tmp_path: Path):
    dataset = dataset_config("digits", tmp_path).dataset
    assert instantiate(dataset.source).fit.shape == (dataset.image_size, dataset.image_size, dataset.channels)
