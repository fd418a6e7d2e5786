"""Labels as class numbers: whatever integers a file holds for its classes, a run counts them from 0."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deepclust.errors import InputError

logger = logging.getLogger(__name__)

UNKNOWN = -1  # the label of an image whose class is not known
MANY_CLASSES = 1000  # above this, more classes than half of the images are taken for a mistake


def number_classes(
    labels: Mapping[Path, np.ndarray], *, num_classes: int | None, class_names: Sequence[str] | None
) -> tuple[np.ndarray, list[str] | None]:
    """Return the labels of all files, joined in order, as class numbers (M,) in int64, and the names of the classes.

    Labels that are class numbers already, from 0 to one less than the number of classes, stay as they are; so does -1,
    which stands for unknown. Any other labels, such as ids, are numbered in ascending order, in all files alike; where
    there are no names, the ids become the names. The number of classes is `num_classes` or the number of names, and the
    number of distinct labels where neither is given.

    Raises:
        InputError: if a label is negative but not -1, or the distinct labels are not as many as there are classes, or
            so many that they are no classes.
    """
    distinct = sorted({int(label) for array in labels.values() for label in np.unique(array)})
    known = [label for label in distinct if label >= 0]
    declared = num_classes if class_names is None else len(class_names)
    is_numbered = not known or known[-1] < (len(known) if declared is None else declared)
    if (distinct and distinct[0] < UNKNOWN) or (not is_numbered and declared not in (None, len(known))):
        raise explain_bad_labels(labels, declared, is_by_name=num_classes is None, num_distinct=len(known))
    num_labelled = sum(int((array >= 0).sum()) for array in labels.values())
    if declared is None and len(known) > max(MANY_CLASSES, num_labelled / 2):
        raise InputError(
            f"the labels in {next(iter(labels))} take {len(known)} distinct values for {num_labelled} images",
            expected="the classes of the images, of which each holds several",
            do="leave the labels out, or set dataset.num_classes if these are the classes",
        )
    names = None if class_names is None else list(class_names)
    if is_numbered:
        return np.concatenate([array.astype(np.int64) for array in labels.values()]), names
    number_of = {UNKNOWN: UNKNOWN} | {label: number for number, label in enumerate(known)}
    logger.info("the %d labels from %d to %d are numbered 0 to %d", len(known), known[0], known[-1], len(known) - 1)
    numbered = []
    for array in labels.values():
        values, positions = np.unique(array, return_inverse=True)
        numbered.append(np.array([number_of[int(value)] for value in values], np.int64)[positions])
    return np.concatenate(numbered), [str(label) for label in known] if names is None else names


def explain_bad_labels(
    labels: Mapping[Path, np.ndarray], declared: int | None, *, is_by_name: bool, num_distinct: int
) -> InputError:
    """Return the error that names the file with labels that are no classes."""

    def is_bad(array: np.ndarray) -> bool:
        return int(array.min()) < UNKNOWN or (declared is not None and int(array.max()) >= declared)

    file, array = next((file, array) for file, array in labels.items() if is_bad(array))
    what = f"the labels in {file} go from {array.min()} to {array.max()}"
    if declared is None or int(array.min()) < UNKNOWN:
        return InputError(what, expected="classes from 0, and -1 for unknown", do="correct the labels")
    reason = f"there are {declared} class names" if is_by_name else f"dataset.num_classes is {declared}"
    cure = (
        "class_names.json" if is_by_name else f"set dataset.num_classes={num_distinct}, the number of distinct labels"
    )
    return InputError(
        what,
        expected=f"classes from 0 to {declared - 1}, for {reason}, or {declared} distinct labels",
        do=f"correct the labels or {cure}",
    )
