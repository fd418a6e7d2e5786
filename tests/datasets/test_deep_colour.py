"""Colour images of 16 bits a channel: all bits are read in every layout of PNG and TIFF, and the scale is the set's."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deepclust.datasets.deep_colour import has_deep_colour, read_deep_colour, repair_layout
from deepclust.datasets.image_decoding import decode_image, find_value_ranges

TWELVE_BITS = np.random.default_rng(0).integers(0, 4096, (6, 7, 4))
TWELVE_BITS[0, 0], TWELVE_BITS[0, 1] = 0, 4095
TWELVE_BITS[..., 3] = 65535
LAYOUTS = {
    f"{order}{', separate planes' * separate}{', compressed' * compressed}": (order, separate, compressed)
    for order in ("little endian", "big endian")
    for separate in (False, True)
    for compressed in (False, True)
}


def write_tiff(file: Path, values: np.ndarray, layout: str = "little endian") -> Path:
    """Write values (H, W, channels) as a TIFF of 16 bits in one strip, or in one for each channel (TIFF 6.0)."""
    order, separate, compressed = LAYOUTS[layout]
    sign = "<" if order == "little endian" else ">"
    height, width, channels = values.shape
    planes = [values[..., channel] for channel in range(channels)] if separate else [values]
    strips = [plane.astype(f"{sign}u2").tobytes() for plane in planes]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    strips = [strip + b"\0" * (len(strip) % 2) for strip in strips]
    starts = [8 + sum(map(len, strips[:number])) for number in range(len(strips))]
    tags = [
        (256, "H", [width]),
        (257, "H", [height]),
        (258, "H", [16] * channels),
        (259, "H", [8 if compressed else 1]),
    ]
    tags += [(262, "H", [2]), (273, "I", starts), (277, "H", [channels]), (278, "H", [height])]
    tags += [(279, "I", [len(strip) for strip in strips]), (284, "H", [2 if separate else 1])]
    tags += [(338, "H", [2])] if channels == 4 else []
    directory = 8 + sum(map(len, strips))
    entries, rest, rest_start = b"", b"", directory + 2 + 12 * len(tags) + 4
    for tag, kind, numbers in tags:
        content = struct.pack(f"{sign}{len(numbers)}{kind}", *numbers)
        if len(content) > 4:
            content, rest = struct.pack(f"{sign}I", rest_start + len(rest)), rest + content
        entries += struct.pack(f"{sign}HHI", tag, {"H": 3, "I": 4}[kind], len(numbers)) + content.ljust(4, b"\0")
    start = (b"II" if sign == "<" else b"MM") + struct.pack(f"{sign}HI", 42, directory)
    count, end = struct.pack(f"{sign}H", len(tags)), struct.pack(f"{sign}I", 0)
    file.write_bytes(start + b"".join(strips) + count + entries + end + rest)
    return file


def write_png(file: Path, values: np.ndarray) -> Path:
    """Write values (H, W, channels) as a PNG of 16 bits."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return file


def read_values(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        repair_layout(image)
        assert has_deep_colour(image)
        return read_deep_colour(image)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_16_bits_of_a_tiff(layout, channels, tmp_path):
    values = TWELVE_BITS[..., :channels]
    found = read_values(write_tiff(tmp_path / "a.tif", values, layout))
    if "planes, compressed" in layout:  # Pillow's decoder for these brings the upper 8 bits only
        assert np.array_equal(found, values >> 8 << 8)
    else:
        assert np.array_equal(found, values)


@pytest.mark.parametrize("channels", [3, 4])
def test_all_16_bits_of_a_png(channels, tmp_path):
    values = TWELVE_BITS[..., :channels]
    assert np.array_equal(read_values(write_png(tmp_path / "a.png", values)), values)


def test_all_16_bits_of_a_grey_png_with_transparency(tmp_path):
    values = TWELVE_BITS[..., 2:]
    found = read_values(write_png(tmp_path / "a.png", values))
    assert np.array_equal(found, values[..., [0, 0, 0, 1]])


@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_colours_are_scaled_by_the_range_of_the_set(suffix, tmp_path):
    write = write_tiff if suffix == ".tif" else write_png
    bright = write(tmp_path / f"bright{suffix}", TWELVE_BITS[:6, :6, :3])
    dark = write(tmp_path / f"dark{suffix}", TWELVE_BITS[:6, :6, :3] // 16)
    ranges, outside = find_value_ranges([str(bright), str(dark)], None)
    assert ranges == {"integer": (0.0, 4095.0)} and not outside
    expected = np.rint(TWELVE_BITS[:6, :6, :3] * (255 / 4095))
    assert np.array_equal(decode_image(bright, image_size=6, channels=3, value_ranges=ranges), expected)
    assert decode_image(dark, image_size=6, channels=3, value_ranges=ranges).max() == 16
    with_alpha = write(tmp_path / f"alpha{suffix}", TWELVE_BITS[:6, :6])
    assert np.array_equal(decode_image(with_alpha, image_size=6, channels=3, value_ranges=ranges), expected)
    _, outside = find_value_ranges([str(bright)], {"integer": (0.0, 100.0)})
    assert outside == [str(bright)]


@pytest.mark.parametrize("ranges", [None, {"integer": (0.0, 65535.0)}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_all_16_bits_the_upper_8_are_kept(layout, ranges, tmp_path):
    values = TWELVE_BITS[:6, :6, :3] * 16
    file = write_tiff(tmp_path / "a.tif", values, layout)
    assert find_value_ranges([str(file)], None)[0] == {"integer": (0.0, 65535.0)}
    assert np.array_equal(decode_image(file, image_size=6, channels=3, value_ranges=ranges), values >> 8)
