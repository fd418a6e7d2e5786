"""Conversions are made once and completely, also when a process fails or several run at once."""

import bz2
import json
import multiprocessing
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image

from deepclust.datasets.one_time_conversion import (
    from_class_folders,
    from_torchvision,
    make_folder_once,
    write_image_array,
)
from deepclust.errors import InputError


def is_made(folder: Path) -> bool:
    return (folder / "done").exists()


def make_slowly(work: Path) -> None:
    with open(work.parent / "log", "a") as log:
        log.write("made\n")
    time.sleep(0.3)
    (work / "done").touch()


def test_several_processes_make_a_folder_once(tmp_path: Path):
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=make_folder_once, args=(tmp_path / "set", make_slowly), kwargs={"ready": is_made})
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "made\n"
    assert is_made(tmp_path / "set")


def test_a_failure_leaves_no_folder(tmp_path: Path):
    def fail(work: Path) -> None:
        (work / "done").touch()
        raise InputError("it failed", expected="success", do="try again")

    with pytest.raises(InputError, match="it failed"):
        make_folder_once(tmp_path / "set", fail, ready=is_made)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []
    make_folder_once(tmp_path / "set", make_slowly, ready=is_made)
    assert is_made(tmp_path / "set")


def test_files_of_a_killed_process_and_an_outdated_folder_are_replaced(tmp_path: Path):
    (tmp_path / ".set.new").mkdir()
    (tmp_path / ".set.new" / "half").touch()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "stale").touch()
    make_folder_once(tmp_path / "set", make_slowly, ready=is_made, replaceable=["stale", "done"])
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["done"]
    assert not (tmp_path / ".set.new").exists() and not (tmp_path / ".set.old").exists()


@pytest.mark.parametrize("name", ["photo.png", "stale/photo.png"])
def test_a_folder_with_files_of_others_is_never_replaced(tmp_path: Path, name: str):
    file = tmp_path / "set" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(
        InputError, match=r"set would be replaced and holds .*, which deepclust has not written.*data_dir"
    ):
        make_folder_once(tmp_path / "set", make_slowly, ready=is_made, replaceable=["stale", "done"])
    assert file.read_text() == "mine" and not (tmp_path / "log").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="data_dir=DIR"):
        make_folder_once(tmp_path / "file" / "set", make_slowly, ready=is_made)


@pytest.mark.parametrize("counts", [[3, 5, 1], [0, 2], [0]])
def test_chunks_are_written_as_one_array(tmp_path: Path, counts: list[int]):
    chunks = [np.random.default_rng(n).integers(0, 256, (n, 4, 5, 3), dtype=np.uint8) for n in counts]
    assert write_image_array(tmp_path / "a.npy", iter(chunks), shape=(4, 5, 3), total=9) == sum(counts)
    if sum(counts):
        stored = np.load(tmp_path / "a.npy", mmap_mode="r")
        assert isinstance(stored, np.memmap) and (stored == np.concatenate(chunks)).all()


# Small copies of the original files of torchvision ----------------------------------------------------------


def write_usps(root: Path, name: str, values: np.ndarray, labels: list[int]) -> None:
    """Write LIBSVM text: a label from 1 to 10, then index:value with values from -1 to 1."""
    lines = []
    for image, label in zip(values.reshape(len(values), -1), labels, strict=True):
        lines.append(" ".join([str(label + 1), *(f"{i + 1}:{2 * int(v) / 255 - 1:.6f}" for i, v in enumerate(image))]))
    (root / name).write_bytes(bz2.compress("\n".join(lines).encode()))


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


TRAIN_TEST = {"train": {"train": True}, "test": {"train": False}}


def test_conversion_of_usps(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 256, (5, 16, 16), dtype=np.uint8)
    write_usps(tmp_path, "usps.bz2", values[:3], [3, 0, 9])
    write_usps(tmp_path, "usps.t.bz2", values[3:], [1, 2])
    from_torchvision(tmp_path, dataset="USPS", splits=TRAIN_TEST, root=str(tmp_path), download=False)
    stored = np.concatenate([np.load(tmp_path / f"{split}_images.npy") for split in ("train", "test")])
    assert stored.shape == (5, 16, 16, 1) and stored.dtype == np.uint8
    assert np.abs(stored[..., 0].astype(int) - values).max() <= 1  # torchvision rounds towards zero
    assert np.load(tmp_path / "train_labels.npy").tolist() == [3, 0, 9]
    assert np.load(tmp_path / "train_labels.npy").dtype == np.int64
    assert np.load(tmp_path / "test_labels.npy").tolist() == [1, 2]


@pytest.mark.parametrize(("dataset", "first"), [("MNIST", "0 - zero"), ("FashionMNIST", "T-shirt/top")])
def test_conversion_of_idx_files(tmp_path: Path, dataset: str, first: str):
    values = np.random.default_rng(0).integers(0, 256, (600, 28, 28), dtype=np.uint8)
    labels = np.arange(600) % 10
    raw = tmp_path / dataset / "raw"
    for prefix, rows in (("train", slice(0, 500)), ("t10k", slice(500, 600))):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", values[rows])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels[rows])
    from_torchvision(tmp_path, dataset=dataset, splits=TRAIN_TEST, root=str(tmp_path), download=False)
    assert (np.load(tmp_path / "train_images.npy")[..., 0] == values[:500]).all()
    assert (np.load(tmp_path / "test_images.npy")[..., 0] == values[500:]).all()
    assert (np.load(tmp_path / "test_labels.npy") == labels[500:]).all()
    names = json.loads((tmp_path / "class_names.json").read_text())
    assert len(names) == 10 and names[0] == first


class FakeSTL10:
    """Like torchvision's STL10: colour images, without labels in one split."""

    classes = ("plane", "bird")

    def __init__(self, root: Path, download: bool, split: str) -> None:
        self.labels = {"train": [1, 0], "test": [0], "unlabeled": [-1, -1, -1]}[split]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.new("RGB", (6, 4), (index, 2, 3)), self.labels[index]


def test_a_split_without_labels_has_no_file_of_labels(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "STL10", FakeSTL10)
    splits = {name: {"split": name} for name in ("train", "test", "unlabeled")}
    from_torchvision(tmp_path, dataset="STL10", splits=splits, root=str(tmp_path), download=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"unlabeled_images.npy", "train_labels.npy", "test_labels.npy"} < names
    assert "unlabeled_labels.npy" not in names
    assert np.load(tmp_path / "unlabeled_images.npy")[2, 0, 0].tolist() == [2, 2, 3]
    assert json.loads((tmp_path / "class_names.json").read_text()) == ["plane", "bird"]


@pytest.mark.parametrize("dataset", ["MNIST", "USPS", "CIFAR10", "CIFAR100"])
def test_missing_files_are_not_downloaded_unless_asked(tmp_path: Path, dataset: str):
    with pytest.raises(InputError, match=r"dataset\.download=true") as caught:
        from_torchvision(tmp_path, dataset=dataset, splits=TRAIN_TEST, root=str(tmp_path / "originals"), download=False)
    assert str(tmp_path / "originals") in str(caught.value)


def test_a_failed_download_is_reported(tmp_path: Path, monkeypatch):
    def fail_without_network(root: Path, download: bool, train: bool) -> None:
        assert download
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail_without_network)
    with pytest.raises(InputError, match=r"no route to host.*expected a network connection"):
        from_torchvision(tmp_path, dataset="CIFAR10", splits=TRAIN_TEST, root=str(tmp_path), download=True)


# Folders of classes -----------------------------------------------------------------------------------------


def write_class_folders(root: Path, counts: dict[str, int]) -> None:
    """Write images whose red value is the number of their class and whose green value is their own number."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name / "images").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 6), (label, i, 0)).save(root / name / "images" / f"{i}.png")


ARGUMENTS = {"splits": ["train"], "image_size": 4, "channels": 3}


def test_class_folders_are_stored_by_class(tmp_path: Path):
    write_class_folders(tmp_path / "train", {"n01": 2, "n02": 3, "n03": 1})
    work = tmp_path / "work"
    work.mkdir()
    from_class_folders(work, root=str(tmp_path), classes=None, num_classes=3, **ARGUMENTS)
    images, labels = np.load(work / "train_images.npy"), np.load(work / "train_labels.npy")
    assert images.shape == (6, 4, 4, 3) and labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert (images[:, 0, 0, 0] == labels).all() and images[:, 0, 0, 1].tolist() == [0, 1, 0, 1, 2, 0]
    assert json.loads((work / "class_names.json").read_text()) == ["n01", "n02", "n03"]
    assert not (work / "unreadable.txt").exists()


def test_chosen_classes_and_an_unreadable_file(tmp_path: Path, caplog):
    write_class_folders(tmp_path / "train", {"n01": 2, "n02": 3, "n03": 2})
    broken = tmp_path / "train" / "n03" / "images" / "0.png"
    broken.write_text("")
    work = tmp_path / "work"
    work.mkdir()
    chosen = {"n01": "one", "n03": "three"}
    from_class_folders(work, root=str(tmp_path), classes=chosen, num_classes=2, **ARGUMENTS)
    assert np.load(work / "train_labels.npy").tolist() == [0, 0, 1]
    assert np.load(work / "train_images.npy")[:, 0, 0, 0].tolist() == [0, 0, 2]
    assert json.loads((work / "class_names.json").read_text()) == ["one", "three"]
    assert (work / "unreadable.txt").read_text().startswith(f"{broken}\t")
    assert "1 image files" in caplog.text


def test_incomplete_class_folders_are_refused(tmp_path: Path):
    write_class_folders(tmp_path / "train", {"n01": 1, "n02": 0})

    def convert(root: str | None, classes: dict[str, str] | None, num_classes: int) -> None:
        from_class_folders(tmp_path, root=root, classes=classes, num_classes=num_classes, **ARGUMENTS)

    with pytest.raises(InputError, match=r"set dataset\.root=DIR to the folder above train/CLASS/IMAGE"):
        convert(None, None, 2)
    with pytest.raises(InputError, match="is not a folder; expected a folder of class folders"):
        convert(str(tmp_path / "train"), None, 2)
    with pytest.raises(InputError, match="holds 2 class folders; expected 200 classes"):
        convert(str(tmp_path), None, 200)
    with pytest.raises(InputError, match="without n07; expected 2 classes, n01 n07"):
        convert(str(tmp_path), {"n01": "a", "n07": "b"}, 2)
    with pytest.raises(InputError, match="n02 holds no image file"):
        convert(str(tmp_path), None, 2)
