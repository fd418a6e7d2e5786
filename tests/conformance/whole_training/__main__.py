"""Train a method's cases with this package and with a checkout of its authors' code; print the largest differences."""

import argparse
import importlib
import json
import logging
import warnings
from pathlib import Path

import numpy as np
import torch

from tests.conformance.whole_training.authors import REPOSITORIES
from tests.conformance.whole_training.given import summarize

VECTORS = Path(__file__).parents[1] / "vectors"
TOLERANCES = {"rtol": 1e-7, "atol": 1e-9}


def compare(ours: dict, theirs: dict) -> dict[str, tuple[float, str]]:
    """Return the largest difference of losses and of weights, and where it is; integers must be equal."""
    assert set(ours) == set(theirs), f"only on one side: {sorted(set(ours) ^ set(theirs))}"
    largest: dict[str, tuple[float, str]] = {}
    for name, values in ours.items():
        assert values.shape == theirs[name].shape, f"{name}: {values.shape}, theirs {theirs[name].shape}"
        difference = float((values.double() - theirs[name].double()).abs().max())
        kind = name.partition(".")[0]
        largest[kind] = max(largest.get(kind, (0.0, "none")), (difference, name.partition(".")[2] or name))
    return largest


def record(method: str, name: str, case: dict, result: dict, source: str) -> None:
    """Write a result as a reference vector of the method, in place of an older one of the same name."""
    folder = VECTORS / method
    manifest_file = folder / "manifest.json"
    manifest = json.loads(manifest_file.read_text())
    prefix = "out_" if manifest.get("conventions", {}).get("prefix") else ""
    arrays = {prefix + key: values.numpy() for key, values in summarize(result).items()}
    file = f"whole_training_{name}.npz"
    np.savez_compressed(folder / file, **arrays)
    entry = {
        "file": file,
        "quantity": "whole_training",
        "meaning": "a whole small training from weights, images, order and views that a hash makes: the loss of each "
        "batch, and of each weight at the end its sum, its length and its product with hashed values",
        "params": case,
        "inputs": {},
        "outputs": {key: f"{values.shape}, {values.dtype}" for key, values in arrays.items()},
        **TOLERANCES,
        "source": source,
    }
    others = [c for c in manifest["cases"] if c["file"] != file]
    manifest["cases"] = [*others, entry]
    manifest_file.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=sorted(REPOSITORIES))
    parser.add_argument("--code", type=Path, required=True, metavar="DIR", help="a checkout of the authors' code")
    parser.add_argument("--case", help="one case only")
    parser.add_argument("--record", action="store_true", help="write what their code gives as reference vectors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for logger in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    module = importlib.import_module(f"tests.conformance.whole_training.{options.method}")
    repository, commit = REPOSITORIES[options.method]
    for name, case in module.CASES.items():
        if options.case in (None, name):
            theirs = module.train_authors(case, options.code)
            differences = compare(module.train_ours(case), theirs)
            listed = ", ".join(f"{kind} {value:.1e} ({where})" for kind, (value, where) in differences.items())
            print(f"{options.method} {name}: {len(theirs['loss'])} batches; largest differences: {listed}", flush=True)
            if options.record and case.get("recorded", True):
                record(options.method, name, case, theirs, f"whole training with the code of {repository}, {commit}")


if __name__ == "__main__":
    main()
