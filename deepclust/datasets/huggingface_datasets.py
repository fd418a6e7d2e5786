"""Data sets of the library `datasets`: a copy on this machine, or one of the Hugging Face Hub.

The library keeps a data set as tables on the disk, which it maps into memory. Each image is read by the number of its
row and decoded each time, so that going on in the middle of an epoch and the shares of processes are those of all data
sets. The splits that are joined follow each other in order. The rows of a data set of the Hub may change: `revision`
pins them.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.datasets.encoded_images import EncodedImageSource
from deepclust.datasets.image_decoding import Kept, StoredSize
from deepclust.datasets.image_sources import ImageSet
from deepclust.datasets.labels import UNKNOWN, number_classes
from deepclust.datasets.value_ranges import ValueRanges, check_ranges
from deepclust.engine.plurals import format_count
from deepclust.errors import InputError
from deepclust.number_types import PositiveFloat, PositiveInt

SAVED_FILES = ("dataset_dict.json", "state.json")  # one of which `save_to_disk` writes beside the tables
# Without OWNER/, the library would also take the names of its readers, such as csv, and read the files in the working
# folder; in version 4 the reader called pandas unpickles them.
NAME_ON_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ONLY_SPLIT = "train"  # what the split of a saved copy without splits is called


def load_huggingface(
    *,
    path: str,
    subset: str | None,
    revision: str | None,
    data_dir: str,
    fit: Sequence[str],
    evaluate: Sequence[str] | None,
    image_column: str | None,
    label_column: str | None,
    image_size: StoredSize,
    channels: PositiveInt,
    keep: Kept,
    value_ranges: ValueRanges | None,
    max_megapixels: PositiveFloat | None,
    num_classes: PositiveInt | None,
    num_workers: PositiveInt,
) -> ImageSet:
    """Load the images of a data set of the library `datasets`, which are decoded each time they are read.

    Args:
        path: a folder that `save_to_disk` wrote, a folder of files that the library reads, or a name on the Hub.
        subset: which of several data sets under this name; None: there is one, as in a folder of `save_to_disk`.
        revision: the version on the Hub, such as a commit; None: the newest. A folder has none.
        data_dir: below which the library keeps what it has fetched or converted.
        fit: splits that are fitted, joined in order.
        evaluate: splits that are evaluated; None evaluates the images of `fit` (the merged protocol).
        image_column: the column of the images; None: there is one.
        label_column: the column of the labels; auto: that of classes, if there is one; None: no labels.
        image_size: short side of the decoded images, as in `decode_image`; so are `channels` and `keep`.
        value_ranges: of values of more than 8 bits. Without them integers go from 0 to 65535 and floats from 0 to 1.
        max_megapixels: the largest image that is read, as in `decode_image`.
        num_classes: number of classes (see `number_classes`). Only if it is None may the labels be missing.
        num_workers: threads that read and decode.

    Raises:
        InputError: if the data set is not there, or a split or column is missing or holds something else.
        ModuleNotFoundError: without the library `datasets`.
    """
    ranges = check_ranges(value_ranges)
    form: dict[str, Any] = {"image_size": image_size, "channels": channels, "keep": keep}
    form |= {"value_ranges": ranges or None, "max_megapixels": max_megapixels, "num_workers": num_workers}
    cache = Path(data_dir).expanduser().absolute() / "huggingface"
    splits = open_splits(path, subset=subset, revision=revision, cache=cache)
    evaluated = list(fit if evaluate is None else evaluate)

    def make_source(names: Sequence[str]) -> EncodedImageSource:
        rows = join_splits(path, splits, names)
        return EncodedImageSource(ImageColumn(path, rows, choose_image_column(path, rows, image_column)), **form)

    fit_source = make_source(fit)
    rows = join_splits(path, splits, evaluated)
    label_column = choose_label_column(path, rows, label_column)
    labels, class_names = None, None
    if label_column is not None:
        values, names = read_labels(path, rows, label_column)
        if names is not None and num_classes not in (None, len(names)):
            raise InputError(
                f"dataset.num_classes is {num_classes} and column {label_column} of {path} has {len(names)} classes",
                expected="the same number",
                do=f"set dataset.num_classes={len(names)}",
            )
        file = Path(f"column {label_column} of {path}")
        labels, class_names = number_classes({file: values}, num_classes=num_classes, class_names=names)
    elif num_classes is not None:
        raise InputError(
            f"dataset.num_classes is {num_classes} and no column of {path} is read for labels",
            expected=f"a column of labels, one of {', '.join(rows.column_names)}",
            do="set dataset.label_column, or dataset.num_classes=null dataset.num_clusters=K",
        )
    return ImageSet(
        fit=fit_source,
        evaluation=fit_source if evaluated == list(fit) else make_source(evaluated),
        labels=labels,
        class_names=class_names,
        value_ranges=ranges or None,
    )


class ImageColumn:
    """The images in one column of a data set, as files that have not been decoded."""

    def __init__(self, path: str, rows: Any, column: str) -> None:
        from datasets import Image

        self.path, self.column = path, column
        self.rows = rows.select_columns([column]).cast_column(column, Image(decode=False))
        stored = self.rows.data
        if stored.num_rows == len(rows) and (missing := stored.column(column).null_count):
            raise InputError(
                f"{missing} of {format_count(len(rows), 'row')} of {path} have no image",
                expected=f"an image in each row of the column {column}",
                do="leave these rows out (Dataset.filter) and save the data set again",
            )

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> bytes:
        image = self.rows[index][self.column]
        if image is not None and image["bytes"] is not None:
            return image["bytes"]
        try:
            if image is None or image["path"] is None:
                raise ValueError("there is none")
            return Path(image["path"]).read_bytes()
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.name(index)} cannot be read: {error}",
                expected="an image in each row",
                do="save the data set again, with its images (Dataset.save_to_disk)",
            ) from error

    def name(self, index: int) -> str:
        return f"the image in row {index} of {self.path}"


def open_splits(path: str, *, subset: str | None, revision: str | None, cache: Path) -> Mapping[str, Any]:
    """Return the splits of a data set by name.

    Raises:
        InputError: if it is neither on this machine nor on the Hub, or is broken.
        ModuleNotFoundError: without the library `datasets`.
    """
    import datasets  # imported here because it takes seconds

    folder = Path(path).expanduser()
    if not folder.exists() and not NAME_ON_HUB.fullmatch(path):
        raise InputError(
            f"{path} is missing",
            expected="a folder, or the name of a data set on the Hugging Face Hub, such as uoft-cs/cifar10",
            do="set dataset.path=DIR or dataset.path=OWNER/NAME",
        )
    is_saved = any((folder / name).is_file() for name in SAVED_FILES)
    for key, value in {"subset": subset if is_saved else None, "revision": revision}.items():
        if value is not None and folder.exists():
            raise InputError(
                f"dataset.{key} is {value} and {path} is a folder{' that save_to_disk wrote' if is_saved else ''}",
                expected=f"no {key}: there is one in such a folder",
                do=f"set dataset.{key}=null, or dataset.path to another folder or to a name on the Hub",
            )
    try:
        if is_saved:
            opened: Any = datasets.load_from_disk(str(folder))
        else:
            place = str(folder.absolute()) if folder.exists() else path  # or a folder called csv passes for a reader
            opened = datasets.load_dataset(place, subset, revision=revision, cache_dir=str(cache))
    except Exception as error:  # the library raises those of files, formats and the network alike
        raise InputError(
            f"{path} cannot be loaded: {' '.join(str(error).split()) or type(error).__name__}",
            expected="a folder of a data set, or the name of one on the Hugging Face Hub",
            do="correct dataset.path or dataset.subset; where the Hub cannot be reached, save the data set elsewhere "
            "(Dataset.save_to_disk) and set dataset.path=DIR",
        ) from error
    return opened if isinstance(opened, Mapping) else {str(opened.split or ONLY_SPLIT): opened}


def join_splits(path: str, splits: Mapping[str, Any], names: Sequence[str]) -> Any:
    """Return the rows of some splits, joined in order.

    Raises:
        InputError: if one is missing or empty, or they have different columns.
    """
    import datasets

    for name in names:
        if name not in splits or len(splits[name]) == 0:
            raise InputError(
                f"{path} has {'an empty' if name in splits else 'no'} split {name}",
                expected=f"one of {', '.join(splits)}",
                do=f"set dataset.source.fit=[{next(iter(splits))}], and dataset.source.evaluate where it is not null",
            )
    parts = [splits[name] for name in names]
    for name, part in zip(names, parts, strict=True):
        if part.features != parts[0].features:
            raise InputError(
                f"the splits {names[0]} and {name} of {path} have different columns or classes",
                expected="the same in all splits that are joined",
                do=f"set dataset.source.fit=[{names[0]}], or correct the data set and save it again",
            )
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def choose_image_column(path: str, rows: Any, column: str | None) -> str:
    """Return the column of the images: `column`, or the only one.

    Raises:
        InputError: if there is none, or there are several and `column` does not say which.
    """
    from datasets import Image

    found = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    if column in found or (column is None and len(found) == 1):
        return column or found[0]
    what = f"{len(found) or 'no'} columns of images" if column is None else f"no column of images named {column}"
    raise InputError(
        f"{path} has {what}",
        expected=f"one of {', '.join(found)}" if found else "a column of the type datasets.Image",
        do=f"set dataset.image_column={found[0]}"
        if found
        else "turn the files or arrays into one (Dataset.cast_column) and save the data set",
    )


def choose_label_column(path: str, rows: Any, column: str | None) -> str | None:
    """Return the column of the labels: `column`, or for auto the only one of classes; None if there is none.

    Raises:
        InputError: if `column` is missing, or there are several and it does not say which.
    """
    from datasets import ClassLabel

    if column is None or column in rows.column_names:
        return column
    found = [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    if column == "auto" and len(found) < 2:
        return found[0] if found else None
    names = found if column == "auto" else rows.column_names
    raise InputError(
        f"{path} has {'several columns of classes' if column == 'auto' else f'no column {column}'}",
        expected=f"one of {', '.join(names)}",
        do=f"set dataset.label_column={found[0]}" if found else "set dataset.label_column=null",
    )


def read_labels(path: str, rows: Any, column: str) -> tuple[np.ndarray, list[str] | None]:
    """Return the labels (M,) in a column of classes, integers or texts, and the names of the classes, if they have any.

    Missing ones are -1.

    Raises:
        InputError: if the column holds something else.
    """
    feature = rows.features[column]
    values = rows.select_columns([column]).with_format("arrow")[:][column]
    dtype = str(getattr(feature, "dtype", ""))
    if dtype in ("string", "large_string"):
        texts = values.to_pylist()
        names = sorted({text for text in texts if text is not None})
        numbers = {name: number for number, name in enumerate(names)}
        return np.array([numbers.get(text, UNKNOWN) for text in texts], np.int64), names
    if re.fullmatch(r"u?int\d+", dtype):
        return values.cast("int64").fill_null(UNKNOWN).to_numpy(), getattr(feature, "names", None)
    raise InputError(
        f"the column {column} of {path} holds {dtype or type(feature).__name__}",
        expected="classes: integers or texts",
        do="set dataset.label_column to another one, or to null",
    )
