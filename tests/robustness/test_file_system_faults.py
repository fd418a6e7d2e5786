"""A command whose writing fails once, at any call and with any error, ends with one line and goes on to the same end.

`failing_writes.c` counts the calls that write below the working folder, and lets one of them fail. Each command runs
once without a fault, then many times with one. By default that is a sample; with DEEPCLUST_FAULTS=all in the
environment every call fails, the first and the last time that it is made, with every error.
"""

import csv
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from tests.robustness.forked_commands import ForkServer

pytestmark = pytest.mark.slow

WIDTH = 512  # bytes of a line in the log of failing_writes.c
ERRORS = {name: str(getattr(errno, name)) for name in ("ENOSPC", "EIO", "EDQUOT", "EINTR")} | {"short": "short"}
NUM_OTHER_FAULTS = 6
# What the system may do at any time: it is right to call again.
REPEATED = {"short": ("write", "writev", "pwrite64", "sendfile64"), "EINTR": ("open", "write", "writev", "pwrite64")}
SMALL = ["hardware=cpu", "report.map_points=0", "report.per_cluster=2"]
TRAINING = ["dataset=arrays", "dataset.path=digits.npz", "backbone=conv_small", "backbone.widths=[8,8]", "views=digits"]
TRAINING += ["backbone.pool_after=[1]", "batch_size=80", "trainer.max_epochs=2", "callbacks.checkpoint.min_seconds=0"]
TRAINING += ["trainer.log_every_n_steps=1", "hydra.run.dir=run", *SMALL]
CLUSTERING = ["num_clusters=4", "num_seeds=1", "hydra.run.dir=run", "decoding_processes=0", *SMALL]
OWN_NETWORK = ["network=own", "images_seen=32", "min_epochs=1", "dataset.image_size=16"]
OWN_NETWORK += ["own_network.backbone.widths=[8,16]", "own_network.backbone.pool_after=[1,2]"]
COMMANDS = {
    "train": ["train", "method=cc", "callbacks.checkpoint.every_n_steps=1", *TRAINING],
    "train_with_e_steps": ["train", "method=propos", "method.hidden_size=16", "method.embedding_size=8", *TRAINING],
    "train_with_stages": ["train", "method=scan", "method.num_neighbors=5", "before.trainer.max_epochs=1", *TRAINING],
    "cluster_vectors": ["cluster", "images=vectors.npy", "min_steps=10", "max_steps=10", *CLUSTERING],
    "cluster_photos": ["cluster", "images=photos", "network=fast", "rule=kmeans", "sort_to=sorted", *CLUSTERING],
    "cluster_own_network": ["cluster", "images=photos", "rule=kmeans", *OWN_NETWORK, *CLUSTERING],
    "predict": ["predict", "run=trained", "images=photos", "output=out.csv", "sort_to=sorted", "accelerator=cpu"],
    "features": ["features", "run=trained", "output=features", "accelerator=cpu"],
    "export": ["export", "run=trained", "format=hub", "output=shared"],
    "compare": ["compare", "runs=trained", "output=table.html"],
}


@dataclass(frozen=True)
class Fault:
    """The `number`-th call `call`, such as "write run/train.log", fails with an error of ERRORS."""

    call: str
    number: int
    error: str

    @property
    def must_be_repeated(self) -> bool:
        return self.call.split()[0] in REPEATED.get(self.error, ())


class Workplace:
    """A folder with inputs, always at the same place, in which commands run with faults or without."""

    def __init__(self, folder: Path, server: ForkServer) -> None:
        self.folder, self.inputs, self.log = folder / "work", folder / "inputs", folder / "calls"
        self.server = server

    def lay_out(self) -> None:
        """Put the inputs, and nothing else, into the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.inputs, self.folder)
        (self.folder / "temporary").mkdir()

    def run(self, name: str, fault: Fault | None = None) -> subprocess.CompletedProcess[str]:
        self.log.unlink(missing_ok=True)
        environment = {"FAULT_FOLDER": self.folder, "FAULT_LOG": self.log, "TMPDIR": self.folder / "temporary"}
        if fault is not None:
            environment |= {"FAULT_CALL": fault.call, "FAULT_NUMBER": fault.number, "FAULT_ERROR": ERRORS[fault.error]}
        texts = {key: str(value) for key, value in environment.items()}
        return self.server.run(COMMANDS[name], folder=self.folder, environment=texts)

    def read_calls(self) -> list[str]:
        """Return the calls of the last command; in patterns for names that the library `tempfile` draws."""
        if not self.log.exists():
            return []
        lines = [line.rstrip() for line in self.log.read_text().splitlines()]
        return [re.sub(r"temporary/(tmp)?[a-z0-9_]{8}\b", r"temporary/\1????????", line) for line in lines]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled failing_writes.c."""
    if not sys.platform.startswith("linux") or shutil.which("cc") is None:
        pytest.skip("it needs a C compiler, called cc, on Linux")
    file = tmp_path_factory.mktemp("library") / "failing_writes.so"
    source = Path(__file__).with_name("failing_writes.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", file, source, "-ldl"], check=True)
    return file


@pytest.fixture(scope="module")
def workplace(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    folder = tmp_path_factory.mktemp("faults").resolve()
    digits = load_digits()
    images = np.rint(digits.images[:160] * (255 / 16)).astype(np.uint8)
    with ForkServer({"LD_PRELOAD": str(library)}, folder / "server") as server:
        workplace = Workplace(folder, server)
        (workplace.inputs / "photos").mkdir(parents=True)
        np.savez(workplace.inputs / "digits.npz", images=images, labels=digits.target[:160])
        np.save(workplace.inputs / "vectors.npy", digits.data[:60].astype(np.float32))
        for number, image in enumerate(images[:8]):
            Image.fromarray(image).save(workplace.inputs / f"photos/{number:02d}.png")
        (workplace.inputs / "photos/broken.png").write_bytes(b"no image")
        workplace.lay_out()
        assert workplace.run("train").returncode == 0
        shutil.copytree(workplace.folder / "run", workplace.inputs / "trained")
        yield workplace


def choose_faults(calls: list[str]) -> list[Fault]:
    """Return the faults to try for the calls of a command, each the first and the last time that it is made.

    By default, that is one error for each call on a checkpoint, and for NUM_OTHER_FAULTS of the others.
    """
    calls = [call for call in calls if "wandb-" not in call]  # temporary folders of a library that is imported
    faults: dict[tuple[str, int], list[Fault]] = {}
    for call, count in Counter(calls).items():
        errors = [error for error in ERRORS if error != "short" or call.split()[0] in REPEATED["short"]]
        for number in sorted({1, count}):
            faults[call, number] = [Fault(call, number, error) for error in errors]
    if os.environ.get("DEEPCLUST_FAULTS") == "all":
        return [fault for of_call in faults.values() for fault in of_call]
    of_checkpoints = [key for key in faults if "run/checkpoints/" in key[0]]
    others = [key for key in faults if key not in of_checkpoints]
    chosen = of_checkpoints + others[:: max(1, len(others) // NUM_OTHER_FAULTS)]
    return [faults[key][position % len(faults[key])] for position, key in enumerate(chosen)]


def read_outcome(folder: Path) -> dict[str, Any]:
    """Return what a command leaves, by file, without what time and memory it took, and without status.json.

    Raises:
        Exception: if any file is not whole.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not is_of_unfinished_features(path)]
    contents = {path: read_content(path) for path in files}
    return {str(path.relative_to(folder)): contents[path] for path in contents if path.name != "status.json"}


def is_of_unfinished_features(file: Path) -> bool:
    """Return whether a file grows block by block: made_by.json, the last in its folder, says that all are whole."""
    return file.parent.name == "features" and not (file.parent / "made_by.json").exists()


def read_content(file: Path) -> Any:
    if file.suffix == ".ckpt":
        checkpoint = torch.load(file, weights_only=True)
        checkpoint["config"]["earlier"].pop("train_seconds", None)
        # Lightning's counters in `loops` tell whether a run was resumed after its last epoch.
        return {key: value for key, value in checkpoint.items() if key != "loops" and not key.endswith("_seconds")}
    if file.name == "results.json":
        results = json.loads(file.read_text())
        results.get("earlier", {}).pop("train_seconds", None)
        return {key: value for key, value in results.items() if key not in ("commit", "timing", "peak_memory_bytes")}
    if file.name == "metrics.csv":
        text = file.read_text()
        assert text.endswith("\n")
        logged = ("step", "epoch", "train/", "eval/", "select/")
        return [{k: v for k, v in row.items() if k.startswith(logged)} for row in csv.DictReader(io.StringIO(text))]
    if file.name == "report.html":  # it tells the time that the training took
        assert file.read_text().rstrip().endswith("</html>")
        return None
    if file.suffix == ".json":
        return json.loads(file.read_text())
    if file.suffix == ".npy":
        return np.load(file).tobytes()
    return None if file.suffix in (".log", ".lock") else file.read_bytes()


def is_same(first: Any, second: Any) -> bool:
    """Return whether two contents are equal, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        same_form = isinstance(second, torch.Tensor) and (first.dtype, first.shape) == (second.dtype, second.shape)
        return same_form and first.numpy().tobytes() == second.numpy().tobytes()
    if isinstance(first, dict):
        return (
            isinstance(second, dict)
            and first.keys() == second.keys()
            and all(is_same(first[k], second[k]) for k in first)
        )
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(map(is_same, first, second))
    return first == second or (first != first and second != second)


def list_changed_keys(first: Any, second: Any) -> list[str]:
    if not isinstance(first, dict):
        return []
    return [key for key in {**first, **second} if not is_same(first.get(key), second.get(key))]


def check_after_fault(
    workplace: Workplace, fault: Fault, completed: subprocess.CompletedProcess[str], whole: dict[str, Any]
) -> None:
    """Check the end of a command with a fault, and that no half-written file has the name of a whole one."""
    said = completed.stderr
    assert "Traceback" not in said, said
    assert not list((workplace.folder / "temporary").iterdir()), "temporary files are left"
    if fault.must_be_repeated:
        assert completed.returncode == 0, said
    if completed.returncode == 0:
        return
    assert completed.returncode == 2 and said.startswith("deepclust: error: ") and said.count("\n") == 1, said
    assert said.count("; ") >= 2 and os.strerror(int(ERRORS[fault.error])) in said, said
    path = Path(fault.call.partition(" ")[2])  # of a folder that is still made, the name that it will have
    names = [re.sub(r"^\.|\.(writing|new)$", "", name).strip("?") for name in (path.name, path.parent.name)]
    assert names[0] in said or (names[1] and names[1] in said), f"{said} names neither of {names}"
    for name, content in read_outcome(workplace.folder).items():
        assert not name.endswith((".writing", ".new", ".old")), f"{name} is left"
        if name.endswith("error.txt"):
            assert content.decode().strip() in said
        elif not name.endswith((".ckpt", "metrics.csv")):  # which are written again and again
            assert is_same(content, whole.get(name, content)), f"{name} is not whole"


def try_fault(workplace: Workplace, name: str, fault: Fault, whole: dict[str, Any]) -> str | None:
    """Run a command with a fault, then without; return what is wrong, or None."""
    workplace.lay_out()
    try:
        completed = workplace.run(name, fault)
        if len(workplace.read_calls()) < fault.number:
            assert fault.call.endswith(("/metrics.csv.writing", "/metrics.csv")), "the call was not made"
            return None  # that file is written once a second, and this run was faster
        check_after_fault(workplace, fault, completed, whole)
        if completed.returncode != 0:
            completed = workplace.run(name)
            assert completed.returncode == 0 and not completed.stderr, completed.stderr
        outcome = read_outcome(workplace.folder)
        assert outcome.keys() == whole.keys(), sorted(outcome.keys() ^ whole.keys())
        for file, content in whole.items():
            assert is_same(outcome[file], content), f"{file} is another: {list_changed_keys(outcome[file], content)}"
    except Exception as error:
        return f"{fault}: {type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", COMMANDS)
def test_a_fault_is_one_line_and_the_command_goes_on(name, workplace, record_property):
    workplace.lay_out()
    completed = workplace.run(name)
    assert completed.returncode == 0, completed.stderr
    calls, whole = workplace.read_calls(), read_outcome(workplace.folder)
    # The folder for temporary files may be too small, and an error there would be told of the wrong disk.
    assert not [call for call in calls if call.startswith("write temporary/tmp")], "outputs are written in their place"
    faults = choose_faults(calls)
    assert len(faults) > 3
    record_property("cases", len(faults))
    wrong = [text for fault in faults if (text := try_fault(workplace, name, fault, whole)) is not None]
    assert not wrong, f"{len(wrong)} of {len(faults)} faults:\n" + "\n".join(wrong)
