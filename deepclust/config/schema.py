"""The types of keys that stand in no section with `_target_`, and are read long after the start.

They are checked before torch is imported. Sections with `_target_` are checked against the signatures of their targets
(`deepclust.config.call_checks`).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import MinLen

from deepclust.config.argument_types import check_value, is_section
from deepclust.config.keys import iterate_entries
from deepclust.number_types import (
    AnyInt,
    FiniteFloat,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveInterval,
)

NotEmptyText = Annotated[str, MinLen(1)]

TYPES: dict[str, Any] = {
    # sections
    **dict.fromkeys(("dataset", "hardware", "evaluation", "report", "names", "earlier", "network"), Mapping[str, Any]),
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
    "pixel_baseline_max_values": NonNegativeInt,
    "report.per_cluster": PositiveInt,
    "report.map_points": NonNegativeInt,
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
    "dataset.max_megapixels": PositiveFloat,
    "dataset.source.image_size": PositiveInt | None,
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
    # conf/cluster.yaml
    "num_clusters": PositiveInt | Literal["auto"],
    "num_seeds": PositiveInt,
    "pretrained": bool,
    "download": bool,
    "rule": Literal["lnscc", "kmeans"] | None,
    "images_seen": PositiveInt,
    "min_epochs": NonNegativeInt,
    "min_steps": NonNegativeInt,
    "max_steps": NonNegativeInt,
    # the other root configurations
    "accelerator": Literal["auto", "cpu", "gpu", "cuda"],
    "link": bool,
    "max_megapixels": PositiveFloat,
    "max_pictures": NonNegativeInt,
    "ignore": Sequence[str],
}


def check_plain_values(values: dict[str, Any]) -> None:
    """Check the values of a resolved configuration that have a type in TYPES, those of earlier stages too.

    Raises:
        InputError: if one is of another type; it names the key.
    """
    for key, value in iterate_entries(values):
        annotation = TYPES.get(re.sub(r"^((before|network)\.)+", "", key))
        # In `network` of conf/cluster.yaml, null stands for a number that is worked out later.
        if annotation is None or (value is None and key.startswith("network.")) or is_section(value):
            continue
        check_value(key, value, annotation)
