"""The project's own functions against recorded numbers.

Each case of each `manifest.json` is one test, `METHOD-FILE`. `DEEPCLUST_CONFORMANCE=DIR` names another folder of the
same form. A method's adapter, `adapters/METHOD.py`, maps a quantity to a function (params, inputs) -> outputs by
name; where equality within the case's tolerance is not what the quantity asks for, its CHECKS holds a comparison of
its own.
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
    """Every expected output within the tolerance; whole numbers exactly."""
    missing = set(expected) - set(actual)
    assert not missing, f"the adapter gives no {sorted(missing)}"
    for name, values in expected.items():
        got = torch.as_tensor(actual[name]).detach()
        assert got.shape == values.shape, f"{name}: {tuple(got.shape)}, expected {tuple(values.shape)}"
        if values.is_floating_point():
            torch.testing.assert_close(
                got.double(),
                values.double(),
                rtol=rtol,
                atol=atol,
                equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )
        else:
            assert torch.equal(got.to(values.dtype), values), f"{name} differs"
