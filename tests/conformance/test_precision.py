"""Cases that were recorded in float32 also hold with float64 inputs: adapters compute in the dtype of their inputs."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conformance.test_vectors import CASES, check_close

FLOAT32_CASES = [
    case for case in CASES if any("float32" in description for description in case.values[1]["inputs"].values())
]


@pytest.mark.parametrize(("folder", "case"), FLOAT32_CASES)
def test_case_in_float64(folder: Path, case: dict):
    adapter = importlib.import_module(f"tests.conformance.adapters.{folder.name}")
    with np.load(folder / case["file"], allow_pickle=False) as arrays:
        inputs = {name: torch.from_numpy(np.array(arrays[name])) for name in case["inputs"]}
        expected = {name: torch.from_numpy(np.array(arrays[name])) for name in case["outputs"]}
    inputs = {name: values.double() if values.is_floating_point() else values for name, values in inputs.items()}
    actual = adapter.ADAPTERS[case["quantity"]](case.get("params", {}), inputs)
    check = getattr(adapter, "CHECKS", {}).get(case["quantity"], check_close)
    check(actual, expected, inputs=inputs, rtol=case["rtol"], atol=case["atol"])
