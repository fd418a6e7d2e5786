"""Finding and decoding image files of all formats, as Pillow writes them."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode

from deepclust.datasets.image_decoding import (
    UnreadableImage,
    convert_images,
    decode_image,
    decode_in_chunks,
    find_image_files,
)
from deepclust.errors import InputError
from tests.datasets.test_deep_colour import write_png

RED, BLUE = (220, 30, 40), (20, 60, 200)


def make_two_halves(width: int = 60, height: int = 40) -> Image.Image:
    """Return an image that is red on the left and blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def assert_two_halves(pixels: np.ndarray, tolerance: float = 3) -> None:
    side = len(pixels)
    left, right = pixels[:, : side // 2 - 1], pixels[:, side // 2 + 1 :]
    assert np.abs(left.reshape(-1, 3).mean(0) - RED).max() <= tolerance
    assert np.abs(right.reshape(-1, 3).mean(0) - BLUE).max() <= tolerance


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp", "bmp", "tif", "TIFF"])
def test_colour_in_all_formats(tmp_path: Path, suffix: str):
    path = tmp_path / f"image.{suffix}"
    make_two_halves().save(path, **({"quality": 95, "subsampling": 0} if suffix in ("jpg", "JPEG") else {}))
    pixels = decode_image(path, image_size=16, channels=3)
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    assert_two_halves(pixels, 12 if suffix == "webp" else 3)


def test_palettes_and_the_first_frame_of_a_gif(tmp_path: Path):
    frames = [make_two_halves().quantize(8), Image.new("RGB", (60, 40), "green").quantize(8)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert_two_halves(decode_image(tmp_path / "a.gif", image_size=16, channels=3))
    make_two_halves().quantize(8).save(tmp_path / "a.png")
    assert_two_halves(decode_image(tmp_path / "a.png", image_size=16, channels=3))


def test_two_images_in_a_jpeg(tmp_path: Path):
    """Some cameras write a second image after the first (MPO)."""
    second = Image.new("RGB", (60, 40), "green")
    make_two_halves().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], quality=95)
    assert_two_halves(decode_image(tmp_path / "a.jpg", image_size=16, channels=3))


def test_the_suffix_need_not_agree_with_the_format(tmp_path: Path):
    make_two_halves().save(tmp_path / "image.png")
    (tmp_path / "image.png").rename(tmp_path / "image.jpg")
    assert_two_halves(decode_image(tmp_path / "image.jpg", image_size=16, channels=3))


def test_grey_and_black_and_white(tmp_path: Path):
    Image.new("L", (30, 20), 77).save(tmp_path / "grey.png")
    Image.new("1", (30, 20), 1).save(tmp_path / "bilevel.png")
    assert (decode_image(tmp_path / "grey.png", image_size=8, channels=3) == 77).all()
    assert (decode_image(tmp_path / "bilevel.png", image_size=8, channels=3) == 255).all()
    grey = decode_image(tmp_path / "grey.png", image_size=8, channels=1)
    assert grey.shape == (8, 8, 1) and (grey == 77).all()


def test_grey_is_the_luma_of_itu_r_601(tmp_path: Path):
    Image.new("RGB", (9, 9), (200, 100, 50)).save(tmp_path / "a.png")
    expected = 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    assert np.abs(decode_image(tmp_path / "a.png", image_size=4, channels=1) - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, suffix: str):
    values = np.array([[0, 257, 32896, 65535]] * 4, np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    pixels = decode_image(tmp_path / f"a.{suffix}", image_size=4, channels=1)
    assert (pixels[0, :, 0] == [0, 1, 128, 255]).all()


def test_float_and_32_bit_grey_are_scaled(tmp_path: Path):
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tiff")
    assert (decode_image(tmp_path / "float.tiff", image_size=4, channels=1) == 128).all()
    Image.fromarray(np.full((4, 4), 65535, np.int32)).save(tmp_path / "long.tiff")
    assert (decode_image(tmp_path / "long.tiff", image_size=4, channels=1) == 255).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(tmp_path: Path, mode: str):
    image = Image.new(mode, (20, 20), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.paste((10, 10, 10, 255) if mode == "RGBA" else (10, 255), (0, 0, 10, 20))
    image.save(tmp_path / "a.png")
    pixels = decode_image(tmp_path / "a.png", image_size=20, channels=3)
    assert (pixels[:, :10] == 10).all() and (pixels[:, 10:] == 255).all()
    half = Image.new("RGBA", (20, 20), (0, 0, 0, 128))
    half.save(tmp_path / "half.png")
    assert np.abs(decode_image(tmp_path / "half.png", image_size=4, channels=3).astype(int) - 127).max() <= 1


def test_transparent_colour_of_a_palette_becomes_white(tmp_path: Path):
    image = Image.new("P", (20, 20), 0)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(1, (0, 0, 10, 20))
    image.save(tmp_path / "a.png", transparency=0)
    image.save(tmp_path / "a.gif", transparency=0)
    for name in ("a.png", "a.gif"):
        pixels = decode_image(tmp_path / name, image_size=20, channels=3)
        assert (pixels[:, :10] == (10, 20, 30)).all() and (pixels[:, 10:] == 255).all()


def test_cmyk_becomes_rgb(tmp_path: Path):
    make_two_halves().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    make_two_halves().convert("CMYK").save(tmp_path / "a.tiff")
    for name in ("a.jpg", "a.tiff"):
        assert_two_halves(decode_image(tmp_path / name, image_size=16, channels=3), 6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str):
    image = Image.fromarray(np.kron(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10, np.ones((8, 8), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    image.save(path, exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
    with Image.open(path) as stored:
        upright = ImageOps.exif_transpose(stored)
        left, top = (upright.width - 32) // 2, (upright.height - 32) // 2
        expected = np.asarray(upright.crop((left, top, left + 32, top + 32)))
    assert (decode_image(path, image_size=32, channels=1)[..., 0] == expected).all()


def test_broken_exif_is_ignored(tmp_path: Path):
    make_two_halves().save(tmp_path / "a.jpg", exif=b"Exif\0\0no such thing", quality=95, subsampling=0)
    assert_two_halves(decode_image(tmp_path / "a.jpg", image_size=16, channels=3))


def test_the_short_side_is_resized_and_the_centre_is_cropped(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "wide.png")
    Image.fromarray(values.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert (decode_image(tmp_path / "wide.png", image_size=48, channels=3) == values[:, 24:72]).all()
    small = np.asarray(Image.fromarray(values).resize((24, 12), Image.Resampling.BILINEAR))[:, 6:18]
    assert np.abs(decode_image(tmp_path / "wide.png", image_size=12, channels=3).astype(int) - small).max() <= 1
    transposed = decode_image(tmp_path / "tall.png", image_size=12, channels=3)
    assert np.abs(transposed.transpose(1, 0, 2).astype(int) - small).max() <= 1
    assert small.std() < values.std() / 3, "noise averages out"


def test_small_images_are_enlarged(tmp_path: Path):
    Image.new("RGB", (3, 5), RED).save(tmp_path / "a.png")
    assert (decode_image(tmp_path / "a.png", image_size=10, channels=3) == RED).all()


def test_large_jpeg_agrees_with_full_decoding(tmp_path: Path):
    y, x = np.mgrid[0:900, 0:1200] / 100
    values = (127 + 60 * np.sin(x)[..., None] + 60 * np.cos(y)[..., None] * [1, -1, 0.5]).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = image.resize((50, 50), Image.Resampling.BILINEAR, box=(150, 0, 1050, 900))
    error = np.abs(decode_image(tmp_path / "a.jpg", image_size=50, channels=3).astype(int) - expected)
    assert error.max() <= 4


def write_broken_files(folder: Path) -> dict[str, Path]:
    """Write files that no decoder can read; return their paths by what is wrong with them."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    files = {}
    for suffix in ("jpg", "png", "webp", "bmp", "tiff", "gif"):
        noise.save(folder / f"whole.{suffix}")
        data = (folder / f"whole.{suffix}").read_bytes()
        (folder / f"whole.{suffix}").unlink()
        files[f"truncated {suffix}"] = folder / f"truncated.{suffix}"
        files[f"truncated {suffix}"].write_bytes(data[: len(data) // 3])
    files["empty"] = folder / "empty.jpg"
    files["empty"].write_bytes(b"")
    files["text"] = folder / "text.jpg"
    files["text"].write_text("no image\n")
    files["other format"] = folder / "drawing.png"
    files["other format"].write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    files["link to nothing"] = folder / "link.jpg"
    files["link to nothing"].symlink_to("nowhere.jpg")
    return files


def test_unreadable_files_are_reported_one_by_one(tmp_path: Path):
    files = write_broken_files(tmp_path)
    for problem, path in files.items():
        with pytest.raises(UnreadableImage) as caught:
            decode_image(path, image_size=8, channels=3)
        assert str(caught.value) and "\n" not in str(caught.value), problem
    make_two_halves().save(tmp_path / "good.png")
    paths = [str(path) for path in files.values()]
    ((readable, images, unreadable),) = decode_in_chunks(
        [*paths[:3], str(tmp_path / "good.png"), *paths[3:]], image_size=16, channels=3
    )
    assert readable == [str(tmp_path / "good.png")] and [path for path, _ in unreadable] == paths
    assert_two_halves(images[0])


def test_many_files_are_decoded_in_order_and_in_chunks(tmp_path: Path):
    paths = []
    for i in range(300):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("L", (2, 2), i % 256).save(paths[-1])
    chunks = list(decode_in_chunks(paths, image_size=2, channels=1))
    assert len(chunks) > 1 and [path for readable, _, _ in chunks for path in readable] == paths
    values = np.concatenate([images[:, 0, 0, 0] for _, images, _ in chunks])
    assert (values == np.arange(300) % 256).all()


def test_image_files_are_found_in_order(tmp_path: Path):
    for name in (
        "b/c/deep.PNG",
        "a.jpg",
        "b/x y é 日.jpeg",
        "b.webp",
        "notes.txt",
        "b/.hidden.jpg",
        ".git/x.png",
        "c/IMG.cr2",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    os.utime(tmp_path / "a.jpg", ns=(5, 7_000_000_123))
    files, other_counts = find_image_files(tmp_path)
    assert [name for name, _, _ in files] == ["a.jpg", "b.webp", "b/c/deep.PNG", "b/x y é 日.jpeg"]
    assert files[0] == ("a.jpg", 5, 7_000_000_123)
    assert other_counts == {".txt": 1, ".cr2": 1}


def test_links_are_followed_but_not_in_a_loop(tmp_path: Path):
    inside, outside = tmp_path / "images", tmp_path / "elsewhere"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    for path in (inside / "a.png", inside / "sub" / "b.png", outside / "c.png"):
        path.write_bytes(b"1")
    (inside / "sub" / "up").symlink_to(inside)
    (inside / "itself").symlink_to("itself")
    (inside / "other").symlink_to(outside)
    (inside / "z.png").symlink_to(outside / "c.png")
    (inside / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(inside / "pipe.png")
    names = [name for name, _, _ in find_image_files(inside)[0]]
    assert names == ["a.png", "gone.png", "other/c.png", "sub/b.png", "z.png"]


# Whole images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height", "expected"), [(40, 30, (15, 20)), (30, 41, (20, 15)), (90, 17, (15, 79))])
def test_whole_images_keep_their_proportions(tmp_path: Path, width, height, expected):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    whole = decode_image(tmp_path / "a.png", image_size=15, channels=3, keep="whole_images")
    assert whole.shape == (*expected, 3)
    as_tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    resized = TF.resize(as_tensor, [15], InterpolationMode.BILINEAR, antialias=True).permute(1, 2, 0)
    assert np.abs(whole.astype(int) - resized.numpy()).max() <= 1, "as torchvision resizes the short side"
    own = decode_image(tmp_path / "a.png", image_size="original", channels=3, keep="whole_images")
    assert np.array_equal(own, pixels)
    converted = convert_images(pixels[None], image_size=15, channels=3, keep="whole_images")
    assert np.array_equal(converted[0], whole)


def test_whole_images_are_turned_upright(tmp_path: Path):
    upright = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored image has to be turned to the right
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "a.png", exif=exif)
    whole = decode_image(tmp_path / "a.png", image_size="original", channels=3, keep="whole_images")
    assert np.array_equal(whole, upright)


def test_large_jpegs_are_whole_too(tmp_path: Path):
    Image.new("RGB", (1600, 1200), RED).save(tmp_path / "a.jpg")
    ((paths, images, unreadable),) = decode_in_chunks(
        [str(tmp_path / "a.jpg"), str(tmp_path / "missing.jpg")], image_size=60, channels=3, keep="whole_images"
    )
    assert len(paths) == len(images) == 1 and images[0].shape == (60, 80, 3) and len(unreadable) == 1
    with pytest.raises(InputError, match=r"dataset\.keep=whole_images"):
        decode_in_chunks([], image_size="original", channels=3).__next__()


def test_the_limit_of_pillow_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # an image of twice as many pixels is refused
    paths = [str(tmp_path / f"{number}.png") for number in range(18)]
    for path in paths:
        Image.new("L", (20, 20)).save(path)
    paths += [str(tmp_path / "grey.tiff"), str(tmp_path / "deep.png")]  # they are compared with the limit twice
    Image.new("L", (20, 20)).save(paths[-2])
    write_png(Path(paths[-1]), np.zeros((20, 20, 3), np.uint16))

    def count_readable(max_megapixels: float | None) -> int:
        chunks = decode_in_chunks(paths, image_size=8, channels=1, max_megapixels=max_megapixels)
        return sum(len(readable) for readable, _, _ in chunks)

    assert [count_readable(limit) for limit in (None, 0.001, None)] == [0, 20, 0]
    assert Image.MAX_IMAGE_PIXELS == 100
