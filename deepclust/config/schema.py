"""The types of keys that stand in no section with `_target_`, and are read long after the start.

They are checked before torch is imported. Sections with `_target_` are checked against the signatures of their targets
(`deepclust.config.call_checks`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from deepclust.config.keys import iterate_entries
from deepclust.config.type_checks import check_value, is_section
from deepclust.number_types import (
    AnyInt,
    FiniteFloat,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    PositiveInterval,
)

NotEmptyText = Annotated[str, MinLen(1)]

TYPES: dict[str, Any] = {
    # sections
    **dict.fromkeys(
        ("dataset", "hardware", "trainer", "clustering", "evaluation", "report", "names", "earlier"), Mapping[str, Any]
    ),
    "own_network": Mapping[str, Any],
    "before": Mapping[str, Any] | None,
    # conf/train.yaml
    "seed": AnyInt,
    "data_dir": NotEmptyText | None,
    "batch_size": PositiveInt,
    "clean_batch_size": PositiveInt,
    "drop_last": bool,
    "sync_batchnorm": bool,
    "batch_norm_groups": PositiveInt,
    "view_names": Annotated[Sequence[str], MinLen(1)],
    "trainer.max_epochs": NonNegativeInt,
    "evaluation.kmeans_restarts": PositiveInt,
    "evaluation.kmeans_max_iterations": PositiveInt,
    "evaluation.kmeans_tolerance": NonNegativeFloat,
    "clustering.backend": Literal["torch", "faiss", "auto"],
    "clustering.seeding_rows_per_cluster": PositiveInt | Literal["auto"] | None,
    "clustering.neighbor_index": Literal["flat", "ivf", "hnsw"],
    "clustering.neighbor_index_min_rows": PositiveInt,
    "pixel_baseline_max_values": NonNegativeInt,
    "report.per_cluster": NonNegativeInt,
    "report.map_points": NonNegativeInt,
    "report.paths": Literal["relative", "absolute"],
    "earlier.train_seconds": NonNegativeFloat,
    "dataset.num_classes": PositiveInt | None,
    "dataset.num_clusters": PositiveInt | Literal["auto"] | None,
    "dataset.num_images": PositiveInt | None,
    "dataset.image_size": PositiveInt | None,
    "dataset.channels": PositiveInt | None,
    "dataset.mean": Annotated[Sequence[FiniteFloat], MinLen(1)] | None,
    "dataset.std": Annotated[Sequence[PositiveFloat], MinLen(1)] | None,
    "dataset.labelled": bool,
    "dataset.download": bool,
    "dataset.standardize": bool,
    "dataset.imbalance": PositiveFraction | None,
    "dataset.max_megapixels": PositiveFloat,
    "dataset.keep": Literal["whole_images", "central_squares"],
    "dataset.stored_size": PositiveInt | Literal["original"] | None,
    "dataset.source.image_size": PositiveInt | Literal["original"] | None,
    "crop_area": PositiveInterval,
    "cutout_side": Fraction,
    # conf/hardware
    "hardware.accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps"],
    "hardware.devices": PositiveInt | Literal["auto"],
    "hardware.num_nodes": PositiveInt,
    "hardware.channels_last": bool,
    "hardware.benchmark": bool,
    "hardware.compile": Literal["default", "max-autotune-no-cudagraphs"] | None,
    "hardware.graphs": bool,
    "hardware.fused_optimizer": bool,
    "hardware.resident_bytes": NonNegativeFloat,
    "hardware.threads": PositiveInt | Literal["auto"],
    # conf/cluster.yaml
    "num_clusters": PositiveInt | Literal["auto"] | Annotated[Sequence[PositiveInt], MinLen(1)],
    "sort_action": Literal["copy", "link", "move"],
    "num_seeds": PositiveInt,
    "network": NotEmptyText,
    "pretrained": bool,
    "download": bool,
    "rule": Literal["lnscc", "kmeans"] | None,
    "duplicates": bool,
    "keep_images": bool,
    "thumbnail_size": PositiveInt | None,
    "decoding_processes": NonNegativeInt | None,
    "outliers": bool,
    "images_seen": PositiveInt,
    "min_epochs": NonNegativeInt,
    "max_fitted": PositiveInt,
    "min_steps": NonNegativeInt,
    "max_steps": NonNegativeInt,
    # the other root configurations
    "accelerator": Literal["auto", "cpu", "gpu", "cuda", "mps"],
    "link": bool,
    "max_megapixels": PositiveFloat,
    "max_pictures": NonNegativeInt,
    "ignore": Sequence[str],
    "sweep": NotEmptyText,
    "watch": bool,
    "json": bool,
    "retry": Literal["failed"] | None,
    "license": NotEmptyText | None,
    "dataset_license": NotEmptyText | None,
}


def check_plain_values(values: dict[str, Any]) -> None:
    """Check the values of a resolved configuration that have a type in TYPES, those of earlier stages too.

    Raises:
        InputError: if one is of another type; it names the key.
    """
    # What a user sets lies further up than what refers to it, so its name is the one that an error tells.
    for key, value in sorted(iterate_entries(values), key=lambda entry: entry[0].count(".")):
        annotation = TYPES.get(re.sub(r"^((before|own_network)\.)+", "", key))
        # In `own_network` of conf/cluster.yaml, null stands for a number that is worked out later.
        if annotation is None or (value is None and key.startswith("own_network.")) or is_section(value):
            continue
        check_value(key, value, annotation)
