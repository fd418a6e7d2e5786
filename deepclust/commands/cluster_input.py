"""What `deepclust cluster` is given: a folder or a list of images, or an array file of images or of vectors."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from deepclust.commands.features import MADE_BY, prepare_folder, read_made_by
from deepclust.datasets.array_files import open_array, read_array_file
from deepclust.datasets.features import convert_vectors
from deepclust.datasets.input_paths import ARRAY_SUFFIXES
from deepclust.datasets.one_time_conversion import write_labels
from deepclust.engine.output_files import write_array, write_text
from deepclust.errors import InputError


def holds_vectors(root: Path) -> bool:
    """Return whether this is an array file of vectors (M, D) in place of images."""
    return root.is_file() and root.suffix in ARRAY_SUFFIXES and open_array(root)["images"].ndim == 2


def describe_array_source(root: Path, dataset: dict[str, Any]) -> dict[str, Any]:
    """Return what changes in the section `dataset` for images in an array file, which are stored as they are."""
    images, _ = read_array_file(root)
    source = {
        "_target_": "deepclust.datasets.array_files.load_array_file",
        "path": str(root),
        "channels": dataset["channels"],
        "num_classes": None,
        "value_ranges": dataset["value_ranges"],
    }
    return {"source": source, "stored_size": int(images.shape[1])}


def write_vectors_as_features(root: Path, folder: Path) -> Path:
    """Write the vectors of an array file, and its labels, as a data set of features; return its folder.

    Nothing is written if they are there already.

    Raises:
        InputError: if the file holds something else.
    """
    arrays = open_array(root)
    vectors, labels = convert_vectors(arrays["images"], str(root)), arrays.get("labels")
    digest = sha256(f"{vectors.dtype} {vectors.shape}".encode())
    digest.update(vectors.data)  # without a copy: there may be gigabytes of them
    if labels is not None:
        if labels.dtype.kind not in "iu" or labels.shape != (len(vectors),):
            raise InputError(
                f"the labels in {root} are {labels.dtype} {labels.shape}",
                expected=f"int64 ({len(vectors)},), one label a vector",
                do="write the file again",
            )
        digest.update(f"{labels.dtype}".encode() + labels.tobytes())
    features = folder / "features"
    if read_made_by(features) == digest.hexdigest():
        return features
    prepare_folder(features)
    if labels is not None:
        write_labels(features / "train_labels.npy", labels.astype("int64"))
    write_array(
        features / "train_features.npy",
        [vectors],
        row_shape=vectors.shape[1:],
        dtype=vectors.dtype,
        total=len(vectors),
    )
    write_text(features / MADE_BY, json.dumps({"sha256": digest.hexdigest(), "vectors": str(root)}, indent=2) + "\n")
    return features
