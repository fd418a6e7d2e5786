"""Sources of images give the images at any indices, from the arrays or files that hold them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deepclust.datasets import image_sources
from deepclust.datasets.image_decoding import decode_image
from deepclust.datasets.image_sources import (
    ArraySource,
    FileSource,
    ResidentSource,
    ResidentWholeImages,
    VectorSource,
    WholeImageSource,
    count_bytes,
)
from deepclust.errors import InputError


def make_random_images(count: int, channels: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 5, 4, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_joined_in_order(channels: int):
    arrays = [make_random_images(count, channels, count) for count in (3, 1, 6)]
    source = ArraySource(arrays)
    assert len(source) == 10 and source.shape == (5, 4, channels)
    for indices in (np.arange(10), np.array([9, 0, 3, 3, 2]), np.array([4]), np.array([], np.int64)):
        images = source.read(indices)
        assert images.dtype == torch.uint8
        assert torch.equal(images, torch.from_numpy(np.concatenate(arrays)[indices]).permute(0, 3, 1, 2))


def test_images_have_channels_last_memory_order():
    images = ArraySource([make_random_images(7, 3)]).read(np.array([1, 5]))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_grey_images_read_with_three_channels():
    grey = make_random_images(4, 1)
    source = ArraySource([grey], channels=3)
    assert source.shape == (5, 4, 3)
    assert torch.equal(source.read(np.arange(4)), ArraySource([grey]).read(np.arange(4)).expand(-1, 3, -1, -1))


@pytest.mark.parametrize("index", [-1, 4])
def test_indices_beyond_the_ends_are_refused(index: int):
    with pytest.raises(IndexError):
        ArraySource([make_random_images(4, 1)]).read(np.array([0, index]))


def test_images_of_memory_mapped_arrays_are_copies(tmp_path: Path):
    np.save(tmp_path / "a.npy", make_random_images(4, 3))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    images = ArraySource([mapped]).read(np.array([2]))
    before = images.clone()
    images.fill_(0)
    assert torch.equal(ArraySource([mapped]).read(np.array([2])), before)


def write_image_files(folder: Path, count: int) -> list[str]:
    paths = []
    for i in range(count):
        values = np.random.default_rng(i).integers(0, 256, (10 + i, 20, 3), dtype=np.uint8)
        paths.append(str(folder / f"ü {i}.png"))
        Image.fromarray(values).save(paths[-1])
    return paths


def test_files_are_decoded_when_read(tmp_path: Path):
    paths = write_image_files(tmp_path, 5)
    source = FileSource(paths, image_size=8, channels=3, num_workers=3)
    assert len(source) == 5 and source.shape == (8, 8, 3)
    indices = np.array([4, 0, 0, 2])
    images = source.read(indices)
    expected = np.stack([decode_image(paths[i], image_size=8, channels=3) for i in indices])
    assert torch.equal(images, torch.from_numpy(expected).permute(0, 3, 1, 2))
    assert torch.equal(images, source.read(indices))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_an_unreadable_file_is_named_when_it_is_read(tmp_path: Path):
    paths = write_image_files(tmp_path, 3)
    Path(paths[1]).write_bytes(b"")
    source = FileSource(paths, image_size=8, channels=3, num_workers=2)
    source.read(np.array([0, 2]))
    with pytest.raises(InputError, match=r"ü 1\.png cannot be read"):
        source.read(np.arange(3))


@pytest.mark.parametrize("kind", ["pixels", "vectors"])
def test_a_resident_source_gives_the_images_of_its_source(kind):
    rng = np.random.default_rng(0)
    if kind == "pixels":
        source = ArraySource([rng.integers(0, 256, (5000, 4, 3, 3), dtype=np.uint8)])
    else:
        source = VectorSource([rng.normal(size=(5000, 7)).astype(np.float32)])
    resident = ResidentSource(source, torch.device("cpu"))
    indices = rng.permutation(5000)[:100]
    images, expected = resident.read(indices), source.read(indices)
    assert torch.equal(images, expected) and images.dtype == expected.dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert len(resident) == 5000 and resident.shape == source.shape


def test_whole_images_of_grey_and_colour_splits_are_kept_on_the_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_sources, "PIECE_PIXELS", 7)
    rng = np.random.default_rng(0)
    shapes = [np.array([[3, 4], [5, 2]]), np.array([[2, 2], [4, 6]])]
    pixels = [
        rng.integers(0, 256, (int(sizes.prod(1).sum()), channels), dtype=np.uint8)
        for sizes, channels in zip(shapes, (1, 3), strict=True)
    ]
    source = WholeImageSource(pixels, shapes, channels=3)
    resident = ResidentWholeImages(source, torch.device("cpu"))
    indices = np.array([2, 0, 3, 1, 0])
    images, expected = resident.read(indices), source.read(indices)
    assert torch.equal(images.pixels, expected.pixels) and torch.equal(images.shapes, expected.shapes)
    assert count_bytes(source) == resident.pixels.nbytes
