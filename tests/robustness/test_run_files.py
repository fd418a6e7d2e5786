"""Run folders whose files are damaged, of another shape or something else: one line each, and nothing half-written."""

import copy
import json
import math
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust.cli.main import main
from deepclust.comparison.finished_runs import read_finished_run
from deepclust.errors import InputError
from deepclust.loggers.metrics_csv import MetricsCsv
from deepclust.report.curves import render_curves
from deepclust.runs.assignments_csv import read_assignments
from deepclust.runs.checkpoint import load_checkpoint
from deepclust.runs.results import read_results
from deepclust.runs.trusted_targets import open_run_config
from tests.conftest import SMALL_RUN, compose_train

pytestmark = pytest.mark.sampled

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


def double_often(value: list, times: int = 60) -> list:
    """Return lists in lists that take a few bytes and stand for 2^60 values."""
    for _ in range(times):
        value = [value, value]
    return value


ENDLESS = {
    "format": lambda c: c.update(format=double_often([1])),
    "config": lambda c: c["config"].update(overrides=double_often(["x"])),
    "number": lambda c: c["config"].update(seed=10**5000),  # Python refuses to write it out
    "format_number": lambda c: c.update(format=10**5000),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_few_bytes_that_stand_for_endless_values(name, finished, run_folder):
    checkpoint = load_checkpoint(finished)
    ENDLESS[name](checkpoint)
    torch.save(checkpoint, run_folder / CHECKPOINT)
    with pytest.raises(InputError) as caught:
        open_run_config(load_checkpoint(run_folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_checkpoint_that_unpacks_to_more_than_its_file_is_not_unpacked(run_folder, monkeypatch):
    with zipfile.ZipFile(run_folder / CHECKPOINT, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("last/data.pkl", bytes(2**24))
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it is unpacked"))
    with pytest.raises(InputError, match=r"last\.ckpt is damaged"):
        load_checkpoint(run_folder)


NUMBERS_THAT_ARE_NONE = {
    "score_huge": lambda r: r["scores"]["kmeans"].update(acc=10**400),
    "score_infinite": lambda r: r["scores"]["kmeans"].update(acc=math.inf),
    "score_true": lambda r: r["scores"]["kmeans"].update(acc=True),
    "pixels_nan": lambda r: r.update(baseline={"kmeans_on_pixels": {"acc": math.nan, "nmi": 0.5, "ari": 0.5}}),
    "seconds_huge": lambda r: r["timing"].update(train_seconds=10**400),
}
VALUES_THAT_ARE_SHOWN = {
    "score_of_another_name": lambda r: r["scores"]["kmeans"].update(other="good"),
    "trust_text": lambda r: r.update(trust="good"),
    "trust_without_message": lambda r: r.update(trust={}),
    "unreadable_text": lambda r: r.update(unreadable="abc"),
    "unreadable_names": lambda r: r.update(unreadable=["a.png"]),
}


@pytest.mark.parametrize("name", [*NUMBERS_THAT_ARE_NONE, *VALUES_THAT_ARE_SHOWN])
def test_results_that_could_not_be_computed_with_or_shown(name, run_folder):
    results = json.loads((run_folder / "results.json").read_text())
    (NUMBERS_THAT_ARE_NONE | VALUES_THAT_ARE_SHOWN)[name](results)
    (run_folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match=r"results\.json is not as deepclust wrote it"):
        read_results(run_folder)
    if name in NUMBERS_THAT_ARE_NONE:  # which the table would add up
        assert "unexpected value" in str(read_finished_run(run_folder, name="run"))


METRICS = ["", "abc\n", "a,b\n1,2", "step,a\n1,abc", "step,a\n,1", "step,a\n1,2,3", "step,a\n-1,0"]
METRICS += [f"step,a\n{2**60},0", f"step,a\n1,{'1' * 200_000}", "step,a\n1,\udcff"]


@pytest.mark.parametrize("content", METRICS, ids=range(len(METRICS)))
def test_metrics(content, tmp_path):
    (tmp_path / "metrics.csv").write_text(content, errors="surrogateescape")
    if content in ("", "abc\n"):  # it has no row
        assert MetricsCsv(folder=tmp_path).rows == {}
        return
    with pytest.raises(InputError, match=r"metrics\.csv is not as deepclust wrote it") as caught:
        MetricsCsv(folder=tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "metrics.csv").unlink()  # the advice works
    MetricsCsv(folder=tmp_path)


@pytest.mark.parametrize("values", [("1e308", "-1e308"), ("5e-324", "0"), ("nan", "inf"), ("1e308", "1e308")])
def test_curves_of_extreme_values_are_drawn(values, tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a\n" + "".join(f"{n},{value}\n" for n, value in enumerate(values)))
    page = render_curves(tmp_path / "metrics.csv", rule_titles={}, final_values={}, steps=1, epochs=1)
    assert "nan" not in page and "inf" not in page


def test_a_cluster_of_more_than_64_bits(tmp_path):
    (tmp_path / "assignments.csv").write_text(f"index,cluster,confidence\n0,{2**63},1.0\n")
    with pytest.raises(InputError, match=r"assignments\.csv cannot be read"):
        read_assignments(tmp_path)


def test_number_of_cases():
    count = len(CHECKPOINTS) + len(ASSIGNMENT_STATES) + 12 + 2 * len(RESULTS) + 8
    print(f"run files: {count} cases")
    assert count > 100
