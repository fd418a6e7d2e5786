"""The values that become black and white where images hold other values than 8 bits.

One image does not tell the range of its values: the darkest photo of a 12-bit camera has no white in it. So the range
belongs to a whole set of images. It is chosen once, kept with the decoded images and with the run, and new images are
scaled by it too. There is one range for integers above 8 bits and one for floats; 8-bit values are never scaled.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.engine.small_files import read_state
from deepclust.errors import InputError

ValueRange = tuple[float, float]  # the values that become 0 and 255
ValueRanges = Mapping[str, ValueRange]  # by kind of value, which is "integer" or "float"

KINDS = ("integer", "float")
RANGES_FILE = "value_ranges.json"
# Where nothing is known of the other images: all of 16 bits, and what floating-point images hold by convention.
DEFAULT_RANGES: ValueRanges = {"integer": (0.0, 65535.0), "float": (0.0, 1.0)}
CONVENTIONAL_HIGHS = (255.0, 65535.0)  # of 8 and 16 bits, whatever type the values are kept in


@dataclass(frozen=True)
class MeasuredValues:
    """The values of one image, or of an array of images, that are not of 8 bits."""

    kind: str
    low: float
    high: float
    declared: ValueRange | None = None  # the range that the file itself states


def kind_of_values(values: np.ndarray) -> str | None:
    """Return "integer" or "float"; None for values of 8 bits, which are not scaled, and for what is no number."""
    if values.dtype == np.uint8 or values.dtype.kind not in "biuf":
        return None
    return "float" if values.dtype.kind == "f" else "integer"


def choose_range(measured: Iterable[MeasuredValues]) -> ValueRange:
    """Return the range of a set of images of one kind.

    It is the range that all files state alike, if their values lie in it. Otherwise it is 0 to 1, 0 to 255 or 0 to
    65535 where the values look like it: none is negative, and the upper half of 255 or 65535 is used. Otherwise it goes
    from the smallest to the largest value.
    """
    items = list(measured)
    low, high = min(item.low for item in items), max(item.high for item in items)
    declared = items[0].declared
    is_stated = declared is not None and all(item.declared == declared for item in items)
    if declared is not None and is_stated and declared[0] <= low and high <= declared[1]:
        return declared
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    for conventional in CONVENTIONAL_HIGHS:
        if low >= 0 and conventional / 2 < high <= conventional:
            return 0.0, conventional
    return (low, high) if low < high else (min(low, 0.0), max(high, 0.0))


def choose_missing_ranges(measured: Iterable[MeasuredValues], given: ValueRanges | None) -> dict[str, ValueRange]:
    """Return the ranges `given` and, for every further kind of value in a set of images, the one that is chosen."""
    by_kind: dict[str, list[MeasuredValues]] = {}
    for item in measured:
        by_kind.setdefault(item.kind, []).append(item)
    chosen = {kind: choose_range(items) for kind, items in by_kind.items()}
    return chosen | check_ranges(given)


def is_outside(measured: MeasuredValues, ranges: ValueRanges) -> bool:
    """Whether some values lie outside the range of their kind, so that they are clipped."""
    low, high = ranges[measured.kind]
    return measured.low < low or measured.high > high


def scale_to_8_bit(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Return values as uint8: the range becomes 0 to 255, and what lies outside is clipped. NaN becomes 0."""
    low, high = value_range
    if value_range != DEFAULT_RANGES["float"] or values.dtype.kind != "f":  # floats from 0 to 1 keep their precision
        values = values.astype(np.float64)
    scaled = (np.clip(values, low, high) - low) * 255 / (high - low)
    return np.rint(np.nan_to_num(scaled, nan=0.0)).astype(np.uint8)


def check_ranges(ranges: Mapping[str, Any] | None) -> dict[str, ValueRange]:
    """Return ranges of a configuration as tuples of floats; none are an empty mapping.

    Raises:
        InputError: unless each is a pair of finite numbers, the smaller one first, under "integer" or "float".
    """
    checked = {}
    for kind, pair in dict(ranges or {}).items():
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2 and all(type(v) in (int, float) for v in pair)
        if kind not in KINDS or not is_pair or not -math.inf < pair[0] < pair[1] < math.inf:
            raise InputError(
                f"dataset.value_ranges has {kind}: {pair}",
                expected="integer or float, and the values of black and white, such as {integer: [0, 4095]}",
                do="correct dataset.value_ranges or leave it out",
            )
        checked[kind] = (float(pair[0]), float(pair[1]))
    return checked


def describe_ranges(ranges: ValueRanges) -> str:
    """Return, for instance, "integers from 0 to 4080 and floats from -1 to 1"."""
    return " and ".join(f"{kind}s from {low:.6g} to {high:.6g}" for kind, (low, high) in sorted(ranges.items()))


def list_some(names: Sequence[str], count: int = 5) -> str:
    """Return the first of these names, separated by commas."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


# Kept beside decoded images ---------------------------------------------------------------------------------


def write_ranges(folder: Path, ranges: ValueRanges) -> None:
    """Write the ranges by which the images in a folder of arrays were scaled; no file if there were none."""
    if ranges:
        (folder / RANGES_FILE).write_text(json.dumps(ranges) + "\n")


def read_ranges(folder: Path) -> dict[str, ValueRange] | None:
    """Return the ranges by which the images in a folder of arrays were scaled, or None if it names none.

    Raises:
        InputError: if the file that names them is damaged or something else.
    """

    def check(content: Any) -> str | None:
        try:
            return None if check_ranges(content) else "it holds no range"
        except (TypeError, ValueError):  # InputError is a ValueError
            return "it holds no ranges"

    content = read_state(folder / RANGES_FILE, check, expected="the values of black and white of the images beside it")
    return None if content is None else check_ranges(content)
