"""Pieces of HTML and ways to write names, numbers and images that several sections of the report share."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

PIXELATED_BELOW = 48  # pixels; the browser enlarges smaller pictures with sharp edges
JPEG_QUALITY = 80  # of all pictures in a report


def render_note(parts: Iterable[str]) -> str:
    """Return a paragraph of small text: the parts, escaped and joined by dots."""
    return f'<p class="dim">{escape(" · ".join(parts))}</p>'


def key_to_words(key: str) -> str:
    """Return a key such as `empty_clusters` with spaces in place of its underscores."""
    return key.replace("_", " ")


def format_number(value: object) -> str:
    """Return a float with four significant digits, an int with thousands separators, anything else as text."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def count_of(count: int, noun: str) -> str:
    """Return a count with its noun: `1 image`, `2,000 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def class_name(index: int, class_names: Sequence[str] | None) -> str:
    """Return the name of a class, or `class INDEX` where classes have no names."""
    return f"class {index}" if class_names is None else class_names[index]


def image_name(index: int, paths: Sequence[str] | None) -> str:
    """Return the path of an image, or `image INDEX` where images have no paths."""
    return f"image {index}" if paths is None else paths[index]


def to_pillow_image(pixels: np.ndarray) -> Image.Image:
    """Return uint8 pixels (H, W, channels) as a Pillow image."""
    return Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)


def shrink_image(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """Return uint8 pixels (H, W, channels) scaled down so that the longer side has at most `max_side` pixels."""
    height, width, channels = pixels.shape
    scale = max_side / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = to_pillow_image(pixels).resize(size, Image.Resampling.LANCZOS)
    return np.asarray(small).reshape(size[1], size[0], channels)


def encode_data_uri(pixels: np.ndarray, **jpeg_options: int) -> str:
    """Return uint8 pixels (H, W, channels) as a data URI: a JPEG if there are options for Pillow's writer, or a PNG."""
    image_format = "jpeg" if jpeg_options else "png"
    file = io.BytesIO()
    to_pillow_image(pixels).save(file, image_format, **jpeg_options)
    return f"data:image/{image_format};base64,{base64.b64encode(file.getvalue()).decode()}"
