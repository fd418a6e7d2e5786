"""Images that a method has generated of each cluster, as one picture."""

import numpy as np

from deepclust.report.html_fragments import PIXELATED_BELOW, encode_data_uri, render_note

MAX_CLUSTERS = 50  # that are shown
GAP = 2  # pixels between images


def arrange_samples(samples: np.ndarray) -> np.ndarray:
    """Return generated images (K, S, H, W, channels) as one picture, uint8 (H, W, 3), with a row for each cluster.

    Small images are enlarged without smoothing. At most MAX_CLUSTERS rows are made.
    """
    factor = max(1, PIXELATED_BELOW // max(samples.shape[2:4]))
    enlarged = samples[:MAX_CLUSTERS].repeat(factor, 2).repeat(factor, 3)
    padded = np.pad(enlarged, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows, columns, height, width, channels = padded.shape
    picture = padded.swapaxes(1, 2).reshape(rows * height, columns * width, channels)[:-GAP, :-GAP]
    return picture if channels == 3 else np.repeat(picture[..., :1], 3, 2)


def describe_samples(samples: np.ndarray) -> str:
    """Return what the picture of generated images (K, S, H, W, channels) shows, as text."""
    count = len(samples)
    shown = f"the first {MAX_CLUSTERS} of {count:,} clusters" if count > MAX_CLUSTERS else f"clusters 0 to {count - 1}"
    return f"generated images, none of the data set; rows from the top: {shown}"


def render_generated_images(samples: np.ndarray | None) -> str:
    """Return the HTML of generated images (K, S, H, W, channels), '' if there are none."""
    if samples is None:
        return ""
    uri = encode_data_uri(arrange_samples(samples))
    return f'{render_note([describe_samples(samples)])}<img src="{uri}" style="max-width:100%;height:auto" alt="">'
