"""Functions of this package against recorded numbers.

Each case of each `manifest.json` is one test with the id `METHOD-FILE`. The environment variable
`DEEPCLUST_CONFORMANCE=DIR` selects another folder of the same form. The adapter of a method, `adapters/METHOD.py`, maps
each quantity to a function (params, inputs) -> outputs, with inputs and outputs by name. Outputs must equal the
recorded ones within the tolerance of the case, unless the adapter's CHECKS has another comparison for the quantity.
"""

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(os.environ.get("DEEPCLUST_CONFORMANCE") or Path(__file__).parent / "vectors")
CASES = [
    pytest.param(manifest.parent, case, id=f"{manifest.parent.name}-{Path(case['file']).stem}")
    for manifest in sorted(FOLDER.glob("*/manifest.json"))
    for case in json.loads(manifest.read_text())["cases"]
]


def test_there_are_cases():
    assert CASES, f"no */manifest.json with cases in {FOLDER}"


@pytest.mark.parametrize(("folder", "case"), CASES)
def test_case(folder: Path, case: dict):
    adapter = importlib.import_module(f"tests.conformance.adapters.{folder.name}")
    quantity = case["quantity"]
    assert quantity in adapter.ADAPTERS, f"no adapter for {quantity}"
    with np.load(folder / case["file"], allow_pickle=False) as arrays:
        inputs = {name: torch.from_numpy(np.array(arrays[name])) for name in case["inputs"]}
        expected = {name: torch.from_numpy(np.array(arrays[name])) for name in case["outputs"]}
    actual = adapter.ADAPTERS[quantity](case.get("params", {}), inputs)
    check = getattr(adapter, "CHECKS", {}).get(quantity, check_close)
    check(actual, expected, inputs=inputs, rtol=case["rtol"], atol=case["atol"])


def check_close(actual: dict, expected: dict, *, inputs: dict, rtol: float, atol: float) -> None:
    """Check that every expected output is there and equal: within the tolerance, or exactly for integers."""
    missing = set(expected) - set(actual)
    assert not missing, f"the adapter does not return {sorted(missing)}"
    for name, values in expected.items():
        output = torch.as_tensor(actual[name]).detach()
        assert output.shape == values.shape, f"{name}: {tuple(output.shape)}, expected {tuple(values.shape)}"
        if values.is_floating_point():
            torch.testing.assert_close(
                output.double(),
                values.double(),
                rtol=rtol,
                atol=atol,
                equal_nan=True,
                msg=lambda message, name=name: f"{name}: {message}",
            )
        else:
            assert torch.equal(output.to(values.dtype), values), f"{name} differs"
