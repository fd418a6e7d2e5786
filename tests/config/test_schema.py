"""Keys outside of sections with `_target_` are checked before anything is imported or built."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from deepclust.config.foreign_types import TRAINER_ARGUMENTS
from deepclust.config.schema import TYPES, check_plain_values
from deepclust.errors import InputError

CONF = Path(__file__).parents[2] / "conf"
ROOTS = sorted(path for path in CONF.rglob("*.yaml") if path.name != "published.yaml")


def list_plain_numbers(node, prefix: str = "") -> list[str]:
    """List the keys with a number or a boolean that are in no section with `_target_`."""
    found = []
    if "_target_" not in node:
        for name, value in node.items():
            key = f"{prefix}.{name}" if prefix else name
            if isinstance(value, bool | int | float):
                found.append(key)
            elif isinstance(value, dict) and key != "hydra":
                found += list_plain_numbers(value, key)
    return found


@pytest.mark.parametrize("path", ROOTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_number_and_boolean_has_a_type(path):
    group = path.parent.name
    content = OmegaConf.to_container(OmegaConf.load(path)) or {}
    content = content if group == "conf" or "# @package _global_" in path.read_text() else {group: content}
    keys = {re.sub(r"^((before|own_network)\.)+", "", key) for key in list_plain_numbers(content)}
    # What a method's file sets in a section whose _target_ stands elsewhere is checked there.
    keys = {key for key in keys if not key.startswith(("method.", "backbone.", "callbacks.", "logger.", "views."))}
    assert keys <= TYPES.keys() | {f"trainer.{name}" for name in TRAINER_ARGUMENTS}


def refuse(values: dict) -> InputError:
    with pytest.raises(InputError) as caught:
        check_plain_values(values)
    return caught.value


def test_whole_numbers_may_be_null_or_zero_epochs():
    check_plain_values(
        {"seed": -1, "batch_size": 1, "trainer": {"max_epochs": 0}, "own_network": {"trainer": {"max_epochs": None}}}
    )
    assert refuse({"own_network": {"batch_size": True}}).what == "own_network.batch_size is True"


@pytest.mark.parametrize(
    ("word", "do"),
    [
        ("no", "set drop_last=false"),
        ("off", "set drop_last=false"),
        ("none", "set drop_last=false"),
        ("False", "set drop_last=false"),
        (0, "set drop_last=false"),
        ("yes", "set drop_last=true"),
        (1, "set drop_last=true"),
        ("maybe", "set drop_last to that"),
        (None, "set drop_last=false"),
        ([], "set drop_last to that"),
    ],
)
def test_only_true_and_false_are_booleans(word, do):
    error = refuse({"drop_last": word})
    assert (error.what, error.expected, error.do) == (f"drop_last is {word!r}", "true or false", do)


@pytest.mark.parametrize(
    ("values", "what", "expected"),
    [
        ({"batch_size": 1e20}, "batch_size is 1e+20", "a whole number, 1 or more and at most 2^63 - 1"),
        ({"batch_size": 10**20}, f"batch_size is {10**20}", "a whole number, 1 or more and at most 2^63 - 1"),
        (
            {"evaluation": {"kmeans_restarts": "abc"}},
            "evaluation.kmeans_restarts is 'abc'",
            "a whole number, 1 or more",
        ),
        ({"report": {"map_points": float("nan")}}, "report.map_points is nan", "a whole number, 0 or more"),
        ({"dataset": {"mean": 0.5}}, "dataset.mean is 0.5", "a list that is not empty, each item a number or null"),
        ({"dataset": {"std": [0.5, 0]}}, "dataset.std.1 is 0", "a number above 0"),
        ({"view_names": "weak"}, "view_names is 'weak'", "a list that is not empty, each item text"),
        ({"before": {"before": {"batch_size": 0}}}, "before.before.batch_size is 0", None),
        ({"before": 0}, "before is 0", "a mapping or null"),
        ({"before": {"hardware": 3}}, "before.hardware is 3", "a mapping"),
        ({"data_dir": ""}, "data_dir is ''", None),
        (
            {"crop_area": [0.9, 0.1]},
            "crop_area is [0.9, 0.1]",
            "a list of 2, each a number above 0, the smaller first",
        ),
        ({"hardware": {"compile": "fast"}}, "hardware.compile is 'fast'", None),
    ],
)
def test_bad_value_is_named_by_its_key(values, what, expected):
    error = refuse(values)
    assert error.what == what and expected in (None, error.expected)
