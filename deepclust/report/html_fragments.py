"""Pieces of the page that its sections share."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

PIXELATED_BELOW = 48  # pixels; smaller pictures are enlarged with sharp edges


def line(parts: Iterable[str]) -> str:
    """One line of small text, escaped."""
    return f'<p class="dim">{escape(" · ".join(parts))}</p>'


def words(key: str) -> str:
    """`a_name` as it is spoken."""
    return key.replace("_", " ")


def number(value: object) -> str:
    """Four significant digits for a fraction; other things as they are."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def class_name(index: int, class_names: Sequence[str] | None) -> str:
    """What a class is called."""
    return f"class {index}" if class_names is None else class_names[index]


def image_name(index: int, paths: Sequence[str] | None) -> str:
    """What an image is called: its path, where it has one."""
    return f"image {index}" if paths is None else paths[index]


def as_image(pixels: np.ndarray) -> Image.Image:
    """uint8 (H, W, channels) for Pillow."""
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, channels), its longer side at most `side` pixels."""
    height, width, channels = pixels.shape
    scale = side / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = as_image(pixels).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(small).reshape(size[1], size[0], channels)


def data_uri(pixels: np.ndarray, **how: int) -> str:
    """uint8 (H, W, channels) as text: a PNG, or with `quality` (and what else Pillow's writer takes) a JPEG."""
    kind = "jpeg" if how else "png"
    file = io.BytesIO()
    as_image(pixels).save(file, kind, **how)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
