"""Adapters take cases with fewer inputs than those in `vectors`, and read the numbers of a case from its params."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conformance.test_vectors import check_close

VECTORS = Path(__file__).parent / "vectors"
CASES = [
    (manifest.parent, case)
    for manifest in sorted(VECTORS.glob("*/manifest.json"))
    for case in json.loads(manifest.read_text())["cases"]
]
# Inputs that say the same in two ways, so that a case may list one of them only.
ALTERNATIVES = {
    ("cc", "instance_loss"): [{"z_i", "z_j"}, {"u_i", "u_j"}],
    ("cc", "cluster_loss"): [{"c_i", "c_j"}, {"logits_i", "logits_j"}],
    ("gcc", "rgc_pretext_loss"): [{"features"}, {"projections"}],
    ("gcc", "rgc_graph_loss"): [{"features"}, {"projections"}],
}
CASES_WITHOUT = [
    pytest.param(folder, case, left_out, id=f"{folder.name}-{Path(case['file']).stem}-without-{sorted(left_out)[0]}")
    for folder, case in CASES
    for left_out in ALTERNATIVES.get((folder.name, case["quantity"]), [])
]


def load(folder, case):
    with np.load(folder / case["file"], allow_pickle=False) as arrays:
        return {name: torch.from_numpy(np.array(arrays[name])) for name in [*case["inputs"], *case["outputs"]]}


@pytest.mark.parametrize(("folder", "case", "left_out"), CASES_WITHOUT)
def test_either_of_two_equivalent_inputs_is_enough(folder, case, left_out):
    adapter = importlib.import_module(f"tests.conformance.adapters.{folder.name}")
    arrays = load(folder, case)
    inputs = {name: arrays[name] for name in case["inputs"] if name not in left_out}
    dropped = {f"grad_{name}" for name in left_out}
    # Gradients of neighbours come from the loss of the same kind of rows.
    dropped |= {f"grad_neighbor_{name}" for name in left_out}
    expected = {name: arrays[name] for name in case["outputs"] if name not in dropped}
    assert "loss" in expected and any(name.startswith("grad_") for name in expected)
    actual = adapter.ADAPTERS[case["quantity"]](case.get("params", {}), inputs)
    check_close(actual, expected, inputs=inputs, rtol=case["rtol"], atol=case["atol"])


def network_case():
    folder, case = next((f, c) for f, c in CASES if c["file"] == "network_cifar.npz")
    adapter = importlib.import_module(f"tests.conformance.adapters.{folder.name}")
    return adapter, case, load(folder, case)


def test_a_network_needs_no_list_of_its_shapes():
    adapter, case, arrays = network_case()
    actual = adapter.ADAPTERS["network_forward"](case["params"], {})
    expected = {name: arrays[name] for name in case["outputs"]}
    check_close(actual, expected, inputs={}, rtol=case["rtol"], atol=case["atol"])


def test_weights_of_a_network_are_those_of_the_first_salt_of_the_case():
    adapter, case, arrays = network_case()
    # The running mean of the stem is linear in its kernel, which is tensor number 0.
    actual = adapter.ADAPTERS["network_forward"]({**case["params"], "first_salt": 7}, {})["out_stem_running_mean"]
    kernel = adapter.make_hashed_values(64 * 27, 7).reshape(64, 3, 3, 3) * (24 / 27) ** 0.5
    size = (case["params"]["B"], 3, case["params"]["size"], case["params"]["size"])
    images = 4 * adapter.make_hashed_values(int(np.prod(size)), 9999).reshape(size)
    expected = 0.1 * torch.nn.functional.conv2d(images, kernel, padding=1).mean((0, 2, 3))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-6)
    assert (actual - arrays["out_stem_running_mean"]).abs().max() > 1e-3
