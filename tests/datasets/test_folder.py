"""A folder of images is converted to an array once, and again when it changes."""

import json
import logging
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from deepclust.datasets.folder import load_folder
from deepclust.datasets.image_decoding import decode_image
from deepclust.datasets.image_sources import ArraySource, ImageSet
from deepclust.errors import InputError


def write_image(path: Path, value: int, size: tuple[int, int] = (12, 9)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2 * value, 0)).save(path)
    return path


def write_folder(root: Path) -> list[Path]:
    """Write five images of several formats; return their paths in sorted order."""
    names = ["a/1.png", "a/sub folder/2 é.png", "b/3.bmp", "b/4.png", "zz.webp"]
    return [write_image(root / name, 20 + i, (10 + i, 30 - i)) for i, name in enumerate(names)]


def load_images(tmp_path: Path, **changes) -> ImageSet:
    arguments = {"path": str(tmp_path / "images"), "data_dir": str(tmp_path / "data")}
    return load_folder(**{**arguments, "image_size": 8, "channels": 3, "labelled": False, **changes})


def converted_folders(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "data").iterdir() if path.is_dir())


def conversion_times(tmp_path: Path) -> list[int]:
    return [(path / "train_images.npy").stat().st_mtime_ns for path in converted_folders(tmp_path)]


def test_images_are_stored_in_the_order_of_their_paths(tmp_path: Path):
    files = write_folder(tmp_path / "images")
    data = load_images(tmp_path)
    assert data.paths == [str(path) for path in files]
    assert data.labels is None and data.class_names is None and data.extra is None and data.evaluation is data.fit
    expected = np.stack([decode_image(path, image_size=8, channels=3) for path in files])
    assert isinstance(data.fit, ArraySource) and isinstance(data.fit.joined.arrays[0], np.memmap)
    assert (data.fit.joined.arrays[0] == expected).all()
    (folder,) = converted_folders(tmp_path)
    index = json.loads((folder / "files.json").read_text())
    assert [file[0] for file in index["files"]] == [str(p.relative_to(tmp_path / "images")) for p in files]
    assert index["files"][0][1:] == [files[0].stat().st_size, files[0].stat().st_mtime_ns]


def test_grey_and_colour_are_stored_separately(tmp_path: Path):
    write_folder(tmp_path / "images")
    assert load_images(tmp_path, channels=1).fit.shape == (8, 8, 1)
    assert load_images(tmp_path, channels=3).fit.shape == (8, 8, 3)
    assert len(converted_folders(tmp_path)) == 2


def test_an_unchanged_folder_is_not_converted_again(tmp_path: Path, monkeypatch):
    write_folder(tmp_path / "images")
    first, before = load_images(tmp_path), conversion_times(tmp_path)
    monkeypatch.chdir(tmp_path)
    again = load_images(tmp_path, path="images")
    assert conversion_times(tmp_path) == before and again.paths == first.paths


@pytest.mark.parametrize("change", ["added", "removed", "rewritten", "touched", "renamed", "same size and name"])
def test_a_changed_folder_is_converted_again(tmp_path: Path, change: str):
    files = write_folder(tmp_path / "images")
    load_images(tmp_path)
    before = conversion_times(tmp_path)
    if change == "added":
        write_image(tmp_path / "images" / "b" / "35.png", 99)
    elif change == "removed":
        files[0].unlink()
    elif change == "rewritten":
        write_image(files[3], 99, (50, 50))
    elif change == "touched":
        os.utime(files[3], ns=(0, 0))
    elif change == "renamed":
        files[3].rename(files[3].with_name("0.png"))
    else:
        data = files[2].read_bytes()
        files[2].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    data = load_images(tmp_path)
    now = sorted(str(p) for p in (tmp_path / "images").rglob("*") if p.is_file())
    assert conversion_times(tmp_path) != before and data.paths == now
    expected = np.stack([decode_image(path, image_size=8, channels=3) for path in now])
    assert (data.fit.read(np.arange(len(now))).permute(0, 2, 3, 1).numpy() == expected).all()


def test_another_size_or_folder_is_stored_separately(tmp_path: Path):
    write_folder(tmp_path / "images")
    write_folder(tmp_path / "more")
    load_images(tmp_path)
    load_images(tmp_path, image_size=6)
    load_images(tmp_path, path=str(tmp_path / "more"))
    assert len(converted_folders(tmp_path)) == 3


def test_unreadable_files_are_listed_and_left_out(tmp_path: Path, caplog):
    files = write_folder(tmp_path / "images")
    (tmp_path / "images" / "b" / "35.jpg").write_text("no image")
    (tmp_path / "images" / "empty.png").write_bytes(b"")
    files[0].write_bytes(files[0].read_bytes()[:50])
    for _ in range(2):  # when the folder is converted, and when the stored images are used
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            data = load_images(tmp_path)
        (folder,) = converted_folders(tmp_path)
        assert data.paths == [str(path) for path in files[1:]] and len(data.fit) == 4
        assert data.fit.read(np.array([1]))[0, 0, 0, 0] == 22
        (record,) = caplog.records
        assert record.getMessage().startswith(f"3 of 7 image files in {tmp_path / 'images'} could not be read")
        lines = (folder / "unreadable.txt").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines] == ["a/1.png", "b/35.jpg", "empty.png"]
        assert all(line.split("\t")[1] for line in lines)
    write_image(tmp_path / "images" / "empty.png", 5)
    assert len(load_images(tmp_path).fit) == 5


def test_a_file_name_that_is_not_utf8(tmp_path: Path):
    (tmp_path / "images").mkdir()
    name = os.fsencode(tmp_path / "images") + b"/caf\xe9.png"
    try:
        with open(name, "wb") as out:
            Image.new("L", (4, 4), 7).save(out, "PNG")
        with open(name.replace(b"caf", b"bad"), "wb"):
            pass
    except OSError:
        pytest.skip("this file system does not accept such names")
    for _ in range(2):
        data = load_images(tmp_path)
        assert len(data.fit) == 1 and data.paths is not None and os.fsencode(data.paths[0]) == name


def test_subfolders_are_labels_only_with_labelled(tmp_path: Path):
    write_folder(tmp_path / "images")
    data = load_images(tmp_path, labelled=True)
    assert data.labels is not None and data.labels.dtype == np.int64
    assert data.labels.tolist() == [0, 0, 1, 1, -1] and data.class_names == ["a", "b"]
    assert load_images(tmp_path).labels is None
    (tmp_path / "flat").mkdir()
    write_image(tmp_path / "flat" / "1.png", 5)
    with pytest.raises(InputError, match=r"no sub-folder with images; .*; set dataset\.labelled=false"):
        load_images(tmp_path, path=str(tmp_path / "flat"), labelled=True)


def test_folders_without_images_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"images is missing; expected a folder of images; set dataset\.path=DIR"):
        load_images(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"holds no image file; expected files ending in \.bmp"):
        load_images(tmp_path)
    (tmp_path / "images" / "IMG_1.CR2").write_bytes(b"1")
    with pytest.raises(InputError, match=r"holds no image file \(but 1 .cr2\)"):
        load_images(tmp_path)
    (tmp_path / "images" / "1.jpg").write_bytes(b"1")
    with pytest.raises(InputError, match=r"none of the 1 image files in .* can be read"):
        load_images(tmp_path)
    assert converted_folders(tmp_path) == []
    with pytest.raises(InputError, match="dataset=arrays"):
        load_images(tmp_path, path=str(tmp_path / "images" / "1.jpg"))


def test_two_processes_convert_a_folder_once(tmp_path: Path):
    files = write_folder(tmp_path / "images")
    fork = multiprocessing.get_context("fork")
    with fork.Pool(2) as pool:
        results = pool.map(load_paths, [tmp_path, tmp_path], chunksize=1)
    assert results == [[str(path) for path in files]] * 2
    assert len(converted_folders(tmp_path)) == 1


def load_paths(tmp_path: Path) -> list[str] | None:
    return load_images(tmp_path).paths


def test_configuration_of_folders(tmp_path: Path):
    write_folder(tmp_path / "images")
    dataset = OmegaConf.load(Path(__file__).parents[2] / "conf" / "dataset" / "folder.yaml")
    config = OmegaConf.create({"dataset": dataset, "data_dir": str(tmp_path / "data")})
    config.dataset.update({"path": str(tmp_path / "images"), "num_clusters": 2, "labelled": True})
    data = instantiate(config.dataset.source)
    assert data.fit.shape == (96, 96, 3) and data.class_names == ["a", "b"]
