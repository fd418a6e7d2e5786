"""The values of black and white: how they are chosen for a set, and how values are scaled by them."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from deepclust.datasets import image_decoding
from deepclust.datasets.image_decoding import UnreadableImage, decode_image, find_value_ranges
from deepclust.datasets.value_ranges import (
    DEFAULT_RANGES,
    MeasuredValues,
    check_ranges,
    choose_missing_ranges,
    choose_range,
    describe_ranges,
    scale_to_8_bit,
)
from deepclust.errors import InputError


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([(0, 1)], (0, 1)),
        ([(0.2, 0.4)], (0, 1)),  # dark photos stay dark
        ([(0, 0)], (0, 1)),
        ([(3, 250)], (0, 255)),
        ([(0, 16)], (0, 16)),
        ([(0, 4080), (10, 300)], (0, 4080)),
        ([(0, 300), (100, 65000)], (0, 65535)),
        ([(200, 70000)], (200, 70000)),
        ([(-1, 1)], (-1, 1)),
        ([(-5, 250)], (-5, 250)),
        ([(7, 7)], (0, 7)),
        ([(-7, -7)], (-7, 0)),
    ],
)
def test_a_range_belongs_to_the_set(values, expected):
    for kind in ("integer", "float"):
        assert choose_range(MeasuredValues(kind, low, high) for low, high in values) == expected


def test_a_range_that_all_files_state_is_taken_if_the_values_lie_in_it():
    stated = MeasuredValues("integer", 5, 900, (0, 4095))
    assert choose_range([stated, stated]) == (0, 4095)
    assert choose_range([stated, MeasuredValues("integer", 5, 900)]) == (5, 900)
    assert choose_range([stated, MeasuredValues("integer", 5, 900, (0, 1023))]) == (5, 900)
    assert choose_range([MeasuredValues("integer", 5, 5000, (0, 4095))]) == (5, 5000)


def test_given_ranges_stay_and_other_kinds_are_chosen():
    measured = [MeasuredValues("integer", 0, 900), MeasuredValues("float", 0, 3)]
    assert choose_missing_ranges(measured, {"integer": (0, 4095)}) == {"integer": (0, 4095), "float": (0, 3)}
    assert choose_missing_ranges([], None) == {}


def test_scaled_values_are_those_of_the_usual_ranges():
    sixteen = np.arange(65536, dtype=np.uint16)
    assert (scale_to_8_bit(sixteen, DEFAULT_RANGES["integer"]) == np.rint(sixteen / 257)).all()
    floats = np.random.default_rng(0).random(100_000).astype(np.float32)
    assert (scale_to_8_bit(floats, DEFAULT_RANGES["float"]) == np.rint(floats * np.float32(255))).all()
    assert scale_to_8_bit(np.array([np.nan, -np.inf, -3, 1, 5, np.inf]), (-3, 5)).tolist() == [0, 0, 0, 128, 255, 255]


@pytest.mark.parametrize(
    "ranges",
    [
        {"int": [0, 1]},
        {"float": [1, 0]},
        {"float": [0, 0]},
        {"float": 3},
        {"float": [0, float("nan")]},
        {"float": [0, float("inf")]},
        {"float": ["a", "b"]},
        {"float": [False, True]},
        {"float": [0, 1, 2]},
        {"float": None},
    ],
)
def test_a_range_is_two_numbers_in_order(ranges):
    with pytest.raises(InputError, match=r"dataset\.value_ranges"):
        check_ranges(ranges)


def test_ranges_are_described():
    text = "floats from -1 to 1 and integers from 0 to 4080"
    assert describe_ranges({"integer": (0, 4080), "float": (-1, 1)}) == text


def save_tiff(path: Path, values: np.ndarray, **tags) -> str:
    directory = ImageFileDirectory_v2()
    for tag, value in tags.items():
        directory[int(tag.removeprefix("tag"))] = value
    Image.fromarray(values).save(path, tiffinfo=directory)
    return str(path)


def test_files_are_measured_together(tmp_path: Path):
    paths = [save_tiff(tmp_path / f"{i}.tif", np.full((4, 4), 1000 * i, np.uint16)) for i in range(1, 4)]
    paths.append(save_tiff(tmp_path / "f.tif", np.full((4, 4), -2, np.float32)))
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    all_paths = [*paths, str(tmp_path / "c.png"), str(tmp_path / "broken.tif"), str(tmp_path / "missing.tif")]
    ranges, outside = find_value_ranges(all_paths, None)
    assert ranges == {"integer": (1000, 3000), "float": (-2, 0)} and outside == []
    pixels = [decode_image(path, image_size=4, channels=1, value_ranges=ranges)[0, 0, 0] for path in paths]
    assert pixels == [0, 128, 255, 0]
    ranges, outside = find_value_ranges(paths, {"integer": (0, 2500)})
    assert ranges["integer"] == (0, 2500) and outside == [paths[2]]
    assert find_value_ranges([str(tmp_path / "c.png")], None) == ({}, [])


def test_the_memory_does_not_grow_with_the_number_of_files_that_have_8_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(image_decoding, "measure_file", lambda path, max_megapixels: None)
    tracemalloc.start()
    try:
        assert find_value_ranges([str(tmp_path / "missing.png")] * 10_000, None) == ({}, [])
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()


def test_tags_of_a_tiff_state_the_range(tmp_path: Path):
    values = np.full((4, 4), 100, np.uint16)
    stated = [save_tiff(tmp_path / f"{i}.tif", values + i, tag281=1023) for i in range(3)]
    assert find_value_ranges(stated, None)[0] == {"integer": (0, 1023)}
    whole_type = [save_tiff(tmp_path / f"w{i}.tif", values + i, tag281=65535) for i in range(3)]
    assert find_value_ranges(whole_type, None)[0] == {"integer": (100, 102)}


def test_one_file_of_unusual_values_is_not_clipped_in_silence(tmp_path: Path):
    path = save_tiff(tmp_path / "x.tif", (np.random.default_rng(0).random((64, 64)) * 254 + 1).astype("f4"))
    with pytest.raises(UnreadableImage, match="it holds values from 1"):
        decode_image(path, image_size=8, channels=1)
    ranges, _ = find_value_ranges([path], None)
    assert decode_image(path, image_size=64, channels=1, value_ranges=ranges).std() > 60
    empty = save_tiff(tmp_path / "nan.tif", np.full((4, 4), np.nan, np.float32))
    assert find_value_ranges([empty], None) == ({}, [])
    with pytest.raises(UnreadableImage, match="no finite number"):
        decode_image(empty, image_size=8, channels=1, value_ranges=ranges)
