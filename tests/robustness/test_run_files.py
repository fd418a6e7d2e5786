"""Run folders whose files are damaged, of another shape or something else: one line each, and nothing half-written."""

import copy
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust.cli.main import main
from deepclust.runs.checkpoint import load_checkpoint
from tests.conftest import SMALL_RUN, compose_train

VERBS = {
    "evaluate": [],
    "predict": ["images={folder}/images.npy", "output={folder}/out.csv"],
    "export": ["format=torchscript", "output={folder}/out.pt"],
}
CHECKPOINT = "checkpoints/last.ckpt"


def change_weight(checkpoint: dict, number: int, change) -> None:
    name = list(checkpoint["state_dict"])[number]
    checkpoint["state_dict"][name] = change(checkpoint["state_dict"][name])


# Changes to the content of a checkpoint, by name.
CHECKPOINTS = {
    **{f"weight_{n}_longer": lambda c, n=n: change_weight(c, n, lambda w: w.flatten().repeat(2)) for n in (0, 3, -1)},
    **{f"weight_{n}_flat": lambda c, n=n: change_weight(c, n, lambda w: w.flatten()[:0]) for n in (0, 5)},
    **{f"weight_{n}_text": lambda c, n=n: change_weight(c, n, lambda w: "weights") for n in (0, 2)},
    "weight_missing": lambda c: c["state_dict"].popitem(),
    "weights_missing": lambda c: c["state_dict"].clear(),
    "weight_unknown": lambda c: c["state_dict"].update(another=torch.ones(2)),
    "state_missing": lambda c: c.pop("state_dict"),
    "state_text": lambda c: c.update(state_dict="text"),
    "state_list": lambda c: c.update(state_dict=[torch.ones(2)]),
    "config_missing": lambda c: c.pop("config"),
    "config_text": lambda c: c.update(config="text"),
    "config_empty": lambda c: c.update(config={}),
    "config_number": lambda c: c.update(config=3),
    "config_tensor": lambda c: c["config"].update(seed=torch.ones(2)),
    "config_without_method": lambda c: c["config"].pop("method"),
    "config_without_source": lambda c: c["config"]["dataset"].pop("source"),
    "config_source_null": lambda c: c["config"]["dataset"].update(source=None),
    "config_views_null": lambda c: c["config"].update(multi_view=None),
    "config_names_list": lambda c: c["config"].update(names=[]),
    "config_seed_text": lambda c: c["config"].update(seed="abc"),
    "method_null": lambda c: c["config"].update(method=None),
    "method_no_target": lambda c: c["config"]["method"].pop("_target_"),
    "method_other": lambda c: c["config"]["method"].update(_target_="deepclust.methods.cc.CC"),
    "method_no_method": lambda c: c["config"].update(method={"_target_": "deepclust.nn.schedules.Constant"}),
    "method_unknown": lambda c: c["config"]["method"].update(_target_="deepclust.methods.nothing.Nothing"),
    "method_smaller": lambda c: c["config"]["method"].update(embedding_size=3),
    "method_huge": lambda c: c["config"]["method"].update(hidden_size=10**15),
    "method_argument_missing": lambda c: c["config"]["method"].pop("embedding_size"),
    "method_argument_text": lambda c: c["config"]["method"].update(embedding_size="abc"),
    "method_open": lambda c: c["config"]["method"].update(embedding_size="???"),
    "format_missing": lambda c: c.pop("format"),
    "format_text": lambda c: c.update(format="two"),
    "format_tensor": lambda c: c.update(format=torch.ones(3)),
}  # fmt: skip
# What only the verbs read that assign new images.
ASSIGNMENT_STATES = {
    "centroids_flat": lambda c: c.update(kmeans_centroids=c["kmeans_centroids"].flatten()),
    "centroids_fewer": lambda c: c.update(kmeans_centroids=c["kmeans_centroids"][:2]),
    "centroids_text": lambda c: c.update(kmeans_centroids="text"),
    "scale_missing": lambda c: c.pop("kmeans_scale"),
    "scale_longer": lambda c: c.update(kmeans_scale=torch.ones(3)),
    "means_missing": lambda c: c.pop("cluster_means"),
    "means_narrow": lambda c: c.update(cluster_means=c["cluster_means"][:, :3]),
}
DEEP = "[" * 100_000 + "]" * 100_000
RESULTS = {
    "empty": "",
    "garbage": "\x00\x01garbage",
    "cut": '{"format": 1, "meth',
    "list": "[1, 2]",
    "null": "null",
    "number": "3",
    "other_format": '{"format": 9}',
    "deep": DEEP,
    "deep_inside": '{"format": 1, "scores": ' + DEEP + "}",
    "no_scores": lambda r: r.pop("scores"),
    "scores_list": lambda r: r.update(scores=[]),
    "scores_text": lambda r: r["scores"].update(kmeans="good"),
    "score_missing": lambda r: r["scores"]["kmeans"].pop("acc"),
    "timing_null": lambda r: r.update(timing=None),
    "timing_empty": lambda r: r.update(timing={}),
    "health_text": lambda r: r.update(health="fine"),
    "steps_text": lambda r: r.update(steps="many"),
    "baseline_list": lambda r: r.update(baseline={"kmeans_on_pixels": [1]}),
    "method_number": lambda r: r.update(method=3),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from deepclust.commands.train import run

    folder = tmp_path_factory.mktemp("finished")
    run(compose_train(*SMALL_RUN, "trainer.max_epochs=1", "report.map_points=0"), folder)
    return folder


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of a finished run, beside an array of images."""
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for name in (CHECKPOINT, "results.json"):
        shutil.copy(finished / name, tmp_path / "run" / name)
    np.save(tmp_path / "images.npy", np.zeros((3, 8, 8), np.uint8))
    return tmp_path / "run"


def assert_refused_in_one_line(monkeypatch, capfd, folder: Path, *arguments: str, names: str) -> None:
    monkeypatch.setattr(sys, "argv", ["deepclust", *(argument.format(folder=folder) for argument in arguments)])
    code = main()
    message = capfd.readouterr().err
    assert code == 2, message
    assert message.startswith("deepclust: error: ") and message.count("\n") == 1, message
    assert message.count("; ") >= 2 and names in message and len(message) < 1000, message
    assert not list(folder.glob("out*")), "nothing is half-written"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name, finished, run_folder, monkeypatch, capfd):
    checkpoint = copy.deepcopy(load_checkpoint(finished))
    CHECKPOINTS[name](checkpoint)
    torch.save(checkpoint, run_folder / CHECKPOINT)
    verb = list(VERBS)[list(CHECKPOINTS).index(name) % len(VERBS)]  # all go through one door
    arguments = [verb, f"run={run_folder}", *VERBS[verb]]
    assert_refused_in_one_line(monkeypatch, capfd, run_folder.parent, *arguments, names="")


@pytest.mark.parametrize("name", ASSIGNMENT_STATES)
def test_assignment_state(name, finished, run_folder, monkeypatch, capfd):
    checkpoint = copy.deepcopy(load_checkpoint(finished))
    ASSIGNMENT_STATES[name](checkpoint)
    torch.save(checkpoint, run_folder / CHECKPOINT)
    verb = ("predict", "export")[list(ASSIGNMENT_STATES).index(name) % 2]
    arguments = [verb, f"run={run_folder}", *VERBS[verb]]
    assert_refused_in_one_line(monkeypatch, capfd, run_folder.parent, *arguments, names="last.ckpt is damaged")


@pytest.mark.parametrize("seed", range(12))
def test_garbage_in_a_checkpoint(seed, run_folder, monkeypatch, capfd):
    """Sixteen bytes of garbage anywhere, the parts between the entries of the archive included."""
    rng, file = np.random.default_rng(seed), run_folder / CHECKPOINT
    content = bytearray(file.read_bytes())
    start = int(rng.integers(0, len(content) - 16)) if seed > 3 else [0, 20, len(content) - 16, len(content) - 40][seed]
    content[start : start + 16] = rng.bytes(16)
    file.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["deepclust", "evaluate", f"run={run_folder}"])
    code, message = main(), capfd.readouterr().err
    # Between two entries there is padding, which holds nothing.
    assert code == 0 or (code == 2 and message.count("\n") == 1 and "last.ckpt" in message), message


@pytest.mark.parametrize("name", RESULTS)
def test_results(name, run_folder, monkeypatch, capfd):
    file = run_folder / "results.json"
    if callable(RESULTS[name]):
        results = json.loads(file.read_text())
        RESULTS[name](results)
        file.write_text(json.dumps(results))
    else:
        file.write_text(RESULTS[name])
    train = ["train", *SMALL_RUN, "trainer.max_epochs=1", "report.map_points=0"]
    commands = [
        ["evaluate", f"run={run_folder}"],
        [*train, f"hydra.run.dir={run_folder}"],
        [*train, f"start={run_folder}", "hydra.run.dir={folder}/new"],
    ]
    arguments = commands[list(RESULTS).index(name) % len(commands)]
    assert_refused_in_one_line(monkeypatch, capfd, run_folder.parent, *arguments, names="results.json")
    monkeypatch.setattr(sys, "argv", ["deepclust", "compare", f"runs={run_folder.parent}"])
    assert main() in (0, 2)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["results.json", CHECKPOINT])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling", "huge"])
def test_something_else_in_its_place(name, kind, run_folder, monkeypatch, capfd):
    file = run_folder / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)  # reading it would wait for ever
    elif kind == "folder":
        file.mkdir()
    elif kind == "dangling":
        file.symlink_to(run_folder / "nothing")
    else:
        with file.open("wb") as new:
            new.truncate(2**36)  # takes no space
    arguments = ["evaluate", f"run={run_folder}"]
    assert_refused_in_one_line(monkeypatch, capfd, run_folder.parent, *arguments, names=name)


def test_number_of_cases():
    count = len(CHECKPOINTS) + len(ASSIGNMENT_STATES) + 12 + 2 * len(RESULTS) + 8
    print(f"run files: {count} cases")
    assert count > 100
