"""A run from a stranger: no verb runs a command that the configuration in its checkpoint names."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from deepclust.cli.main import main
from deepclust.errors import InputError
from deepclust.runs.checkpoint import load_checkpoint, load_method
from deepclust.runs.run_folder import CHECKPOINT
from deepclust.runs.trusted_targets import (
    SECTIONS_NOT_BUILT,
    TRUSTED_TARGETS,
    is_own_target,
    is_trusted,
    open_run_config,
    split_trust,
)
from tests.conftest import SMALL_RUN, compose_train

pytestmark = pytest.mark.sampled

CONF = Path(__file__).parents[2] / "conf"
VERBS = {
    "evaluate": [],
    "predict": ["images={folder}/images.npy", "output={folder}/out.csv"],
    "export": ["format=torchscript", "output={folder}/out.pt"],
    "features": ["output={folder}/out", "data_dir={folder}/data"],
}


def gadgets(marker: str) -> dict[str, dict]:
    """Sections that, if they were built, would make the file `marker` (or read what does), by name."""
    folder = str(Path(marker).parent)
    python = f"open({marker!r}, 'w').close()"
    path = {"_target_": "pathlib.Path", "_args_": [marker]}
    pickle = {"f": f"{folder}/evil.pkl", "weights_only": False}
    written = {"folder": folder, "unreadable": [["a", "b"]]}
    touch = {"_target_": "os.system", "_args_": [f"touch {marker}"]}
    return {
        "sympify": {"_target_": "sympy.sympify", "_args_": [f"__import__('os').system('touch {marker}')"]},
        "torch_load": {"_target_": "torch.load", **pickle},
        "numpy_load": {"_target_": "numpy.load", "file": f"{folder}/evil.npy", "allow_pickle": True},
        "joblib_load": {"_target_": "joblib.load", "filename": f"{folder}/evil.joblib"},
        "pickle_load": {"_target_": "pandas.read_pickle", "_args_": [f"{folder}/evil.pkl"]},
        "hub": {"_target_": "torch.hub.load", "repo_or_dir": folder, "source": "local", "model": "evil"},
        "write_text": {"_target_": "pathlib.Path.write_text", "_args_": [path, "x"]},
        "eval": {"_target_": "builtins.eval", "_args_": [python]},
        "exec": {"_target_": "builtins.exec", "_args_": [python]},
        "subprocess": {"_target_": "subprocess.run", "args": ["touch", marker]},
        "popen": {"_target_": "os.popen", "cmd": f"touch {marker}"},
        "pty": {"_target_": "pty.spawn", "argv": ["touch", marker]},
        "runpy": {"_target_": "runpy.run_path", "path_name": f"{folder}/hubconf.py"},
        "code": {"_target_": "timeit.timeit", "stmt": python, "number": 1},
        "import_module": {"_target_": "importlib.import_module", "name": "antigravity"},
        "own_module_os": {"_target_": "deepclust.runs.results.os.system", "_args_": [f"touch {marker}"]},
        "own_module_subprocess": {"_target_": "deepclust.runs.provenance.subprocess.run", "args": ["touch", marker]},
        "own_class_os": {"_target_": "deepclust.backbones.pretrained.torch.os.system", "_args_": [f"touch {marker}"]},
        "own_reexport": {"_target_": "deepclust.backbones.pretrained.torch.load", **pickle},
        "own_import": {"_target_": "deepclust.config.targets.importlib.import_module", "name": "antigravity"},
        "own_build": {"_target_": "deepclust.config.build.build", "node": touch, "_recursive_": False},
        "own_writer": {"_target_": "deepclust.datasets.one_time_conversion.write_unreadable_list", **written},
        "own_verb": {"_target_": "deepclust.cli.jobs.run_verb", "verb": "train", "arguments": ["--help"]},
        "own_worker": {"_target_": "deepclust.engine.launch.call_in_worker", "_args_": [{**touch, "_partial_": True}]},
        "partial": {"_target_": "functools.partial", "_args_": [touch]},
        "bound": {**touch, "_partial_": True},
        "instantiate": {"_target_": "hydra.utils.instantiate", "config": touch, "_recursive_": False},
        "call": {"_target_": "hydra.utils.call", "config": touch, "_recursive_": False},
        "get_method": {"_target_": "hydra.utils.get_method", "path": "os.system"},
        "methodcaller": {"_target_": "operator.methodcaller", "_args_": ["touch"]},
        "attrgetter": {"_target_": "operator.attrgetter", "_args_": ["system"]},
        "trainer": {"_target_": "lightning.Trainer", "default_root_dir": folder},
        "nested": {"_target_": "deepclust.nn.schedules.Constant", "_args_": [[{"deep": [touch]}]]},
        "reference": {"_target_": "${oc.decode:'os.system'}", "_args_": [f"touch {marker}"]},
        "environment": {"_target_": "deepclust.nn.schedules.Constant", "key": "${oc.env:HOME}"},
        "not_text": {"_target_": ["os.system"], "_args_": [f"touch {marker}"]},
        "spaces": {"_target_": " os.system", "_args_": [f"touch {marker}"]},
    }  # fmt: skip


PLACES = (
    "method",
    "method.optimizer",
    "method.backbone",
    "dataset.source",
    "multi_view",
    "multi_view.pipelines.weak.0",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, with the files that gadgets read."""
    from deepclust.commands.train import run

    folder = tmp_path_factory.mktemp("finished")
    results = run(compose_train(*SMALL_RUN, "trainer.max_epochs=1", "report.map_points=0"), folder)
    assert results["format"] == 1
    np.save(folder / "images.npy", np.zeros((3, 8, 8), np.uint8))
    return folder


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self):
        return subprocess.getoutput, (f"touch {self.marker}",)


@pytest.fixture
def stranger(finished, tmp_path, monkeypatch):
    """A function that puts a section at a dotted place in the checkpoint of a run, and returns the run's folder."""
    import pickle

    monkeypatch.chdir(tmp_path)
    marker = str(tmp_path / "marker")
    evil = pickle.dumps(Evil(marker))
    for name in ("evil.pkl", "evil.npy", "evil.joblib"):
        (tmp_path / name).write_bytes(evil)
    (tmp_path / "hubconf.py").write_text(f"open({marker!r}, 'w').close()\n")
    np.save(tmp_path / "images.npy", np.zeros((3, 8, 8), np.uint8))

    def make(place: str, section) -> Path:
        checkpoint = copy.deepcopy(load_checkpoint(finished))
        node = checkpoint["config"]
        *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
        for part in path:
            node = node[part] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = section
        (tmp_path / "run/checkpoints").mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, tmp_path / "run" / CHECKPOINT)
        return tmp_path / "run"

    return make


def call(monkeypatch, capfd, *arguments: str) -> tuple[int, str]:
    """Run a command inside this process; return its exit code and standard error."""
    monkeypatch.setattr(sys, "argv", ["deepclust", *arguments])
    code = main()
    return code, capfd.readouterr().err


def assert_refused(code: int, message: str, folder: Path) -> None:
    assert code == 2, message
    assert message.startswith("deepclust: error: ") and message.count("\n") == 1, message
    assert message.count("; ") >= 2
    assert not (folder / "marker").exists(), "a command ran"
    assert not list(folder.glob("out*")) and not (folder / "unreadable.txt").exists(), "something was written"


# `make test` tries each gadget with one verb, `make test-all` with all.
@pytest.mark.parametrize(
    ("number", "name", "verb"),
    [
        pytest.param(number, name, verb, marks=[pytest.mark.slow] * (number % len(VERBS) != verb_number))
        for number, name in enumerate(gadgets("/x"))
        for verb_number, verb in enumerate(VERBS)
    ],
)
def test_gadget_runs_nothing(stranger, tmp_path, monkeypatch, capfd, verb, number, name):
    place = PLACES[(number + list(VERBS).index(verb)) % len(PLACES)]
    run = stranger(place, gadgets(str(tmp_path / "marker"))[name])
    rest = [argument.format(folder=tmp_path) for argument in VERBS[verb]]
    code, message = call(monkeypatch, capfd, verb, f"run={run}", *rest)
    assert_refused(code, message, tmp_path)
    assert "antigravity" not in sys.modules
    assert place in message, "the line names the key"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("place", [*PLACES, "method.extra", "dataset.source.make", "views.clean.0", "evaluation.more"])
def test_place_builds_no_gadget(stranger, tmp_path, monkeypatch, capfd, verb, place):
    run = stranger(place, gadgets(str(tmp_path / "marker"))["bound"])
    rest = [argument.format(folder=tmp_path) for argument in VERBS[verb]]
    assert_refused(*call(monkeypatch, capfd, verb, f"run={run}", *rest), tmp_path)


@pytest.mark.parametrize("section", SECTIONS_NOT_BUILT)
def test_sections_that_are_not_built_run_nothing(stranger, tmp_path, monkeypatch, capfd, section):
    gadget = gadgets(str(tmp_path / "marker"))["subprocess"]
    run = stranger(f"{section}.strategy", gadget) if section != "before" else stranger("before", {"method": gadget})
    for verb, rest in VERBS.items():
        code, message = call(monkeypatch, capfd, verb, f"run={run}", *(a.format(folder=tmp_path) for a in rest))
        assert code in (0, 2), message
    assert not (tmp_path / "marker").exists()


def test_start_of_another_run_is_no_other_door(finished, stranger, tmp_path, monkeypatch, capfd):
    run = stranger("method.optimizer", gadgets(str(tmp_path / "marker"))["bound"])
    (run / "results.json").write_bytes((finished / "results.json").read_bytes())
    arguments = ["method=self_label", "hardware=cpu", "backbone=conv_small", f"start={run}"]
    code, message = call(monkeypatch, capfd, "train", *arguments, f"hydra.run.dir={tmp_path}/new")
    assert code == 2 and message.count("\n") == 1 and "method.optimizer._target_=os.system" in message
    assert not (tmp_path / "marker").exists()


def test_going_on_in_a_folder_builds_nothing_of_its_checkpoint(stranger, tmp_path, monkeypatch, capfd):
    """The checkpoint is compared with the command's configuration, which alone is built."""
    run = stranger("method.optimizer", gadgets(str(tmp_path / "marker"))["subprocess"])
    arguments = [*SMALL_RUN, "trainer.max_epochs=1", "report.map_points=0", f"hydra.run.dir={run}"]
    code, message = call(monkeypatch, capfd, "train", *arguments)
    assert code == 2 and "method.optimizer" in message and "start in another folder" in message
    assert not (tmp_path / "marker").exists()


def test_a_checkpoint_with_an_object_is_not_unpickled(stranger, tmp_path, monkeypatch, capfd):
    marker = tmp_path / "marker"
    run = stranger("method.extra", 0)
    torch.save({"format": 2, "state_dict": Evil(str(marker))}, run / CHECKPOINT)
    for verb, rest in VERBS.items():
        rest = [argument.format(folder=tmp_path) for argument in rest]
        assert_refused(*call(monkeypatch, capfd, verb, f"run={run}", *rest), tmp_path)
    torch.load(run / CHECKPOINT, weights_only=False)
    assert marker.exists(), "the object is one that would have run something"


def test_predict_and_export_open_no_data_set_of_the_run(stranger, tmp_path, monkeypatch, capfd):
    section = {"_target_": "deepclust.datasets.array_files.load_array_file", "path": str(tmp_path / "pipe")}
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    run = stranger("dataset.source", section | {"channels": 1, "num_classes": None})
    for verb in ("predict", "export"):
        rest = [argument.format(folder=tmp_path) for argument in VERBS[verb]]
        assert call(monkeypatch, capfd, verb, f"run={run}", *rest)[0] == 0


def test_trusted_package_is_built(stranger, tmp_path, monkeypatch, capfd):
    (tmp_path / "strange.py").write_text("import os, subprocess\n\nclass Decay:\n    def __init__(self, **k): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = stranger("method.schedule", {"_target_": "strange.Decay"})
    arguments = ["predict", f"run={run}", f"images={tmp_path}/images.npy", f"output={tmp_path}/out.csv"]
    code, message = call(monkeypatch, capfd, *arguments)
    assert code == 2 and "add trust=strange" in message
    assert "strange" not in sys.modules, "an untrusted package is not even imported"
    assert call(monkeypatch, capfd, *arguments, "trust=other,strange")[0] == 0
    assert call(monkeypatch, capfd, *arguments, "trust=[strange]")[0] == 0
    run = stranger(
        "method.schedule", {"_target_": "strange.subprocess.run", "args": ["touch", str(tmp_path / "marker")]}
    )
    (tmp_path / "out.csv").unlink()
    assert_refused(*call(monkeypatch, capfd, *arguments, "trust=strange"), tmp_path)


def test_weights_are_neither_read_nor_fetched_again(finished, tmp_path):
    checkpoint = copy.deepcopy(load_checkpoint(finished))
    timm_model = {"_target_": "deepclust.backbones.pretrained.timm_model", "model_name": "resnet10t", "in_chans": 1}
    timm_model |= {"num_classes": 0, "pretrained": True, "weights": None, "checkpoint_path": str(tmp_path / "evil.pth")}
    checkpoint["config"]["method"]["backbone"] = timm_model
    with pytest.raises(InputError, match="do not fit") as raised:
        load_method(checkpoint)
    assert "size mismatch" in str(raised.value) or "Missing key" in str(raised.value), "it got as far as the weights"


def test_lists_are_those_of_our_configurations():
    """Every target of the sections that are built from runs is trusted, and no other function is on the list."""
    named = set()
    for file in CONF.rglob("*.yaml"):
        group = file.relative_to(CONF).parts[0]
        if group in ("callbacks", "logger", "hardware", "hydra"):
            continue
        content = yaml.safe_load(re.sub(r"\$\{[^}]*\}+", "x", file.read_text())) or {}
        sections = {
            k: v for k, v in content.items() if group not in ("train.yaml", "experiment") or k not in SECTIONS_NOT_BUILT
        }
        named |= set(re.findall(r"'_target_': '([^']+)'", str(sections)))
    assert len(named) > 40
    assert {target for target in named if not is_own_target(target)} == set()
    assert named >= TRUSTED_TARGETS


@pytest.mark.parametrize(
    "target, is_trusted_target",
    {
        "deepclust.methods.cc.CC": True,
        "deepclust.backbones.stacked.Stacked": True,
        "deepclust.methods.cc.nn.Linear": False,
        "deepclust.methods.cc.ClusteringMethod": False,
        "deepclust.methods.cc.CC.load_from_checkpoint": False,
        "deepclust.methods.nothing.CC": False,
        "deepclust.backbones.pretrained.read_state_dict": False,
        "deepclust.datasets.one_time_conversion.make_folder_once": False,
        "deepclust.cli.main.main": False,
        "deepclust": False,
        "": False,
    }.items(),
)
def test_own_targets(target, is_trusted_target):
    assert is_own_target(target) == is_trusted_target


def test_trust():
    assert split_trust(None) == split_trust("") == []
    assert split_trust("a, b.c") == split_trust(["a", "b.c"]) == ["a", "b.c"]
    assert is_trusted("statistics.mean", "k", ("statistics",)) and is_trusted("os.system", "k", ("os.system",))
    assert not is_trusted("statistics.math.sqrt", "k", ("statistics",)) and not is_trusted("ab.c", "k", ("a",))


def test_deep_nesting_is_named(finished):
    checkpoint = copy.deepcopy(load_checkpoint(finished))
    node: dict = {}
    for _ in range(100_000):
        node = {"a": node}
    checkpoint["config"]["deep"] = node
    with pytest.raises(InputError, match="nested too deeply"):
        open_run_config(checkpoint)
