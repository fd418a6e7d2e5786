"""What `deepclust export` writes gives the run's assignments, in a process that cannot import this package."""

import csv
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from deepclust.callbacks.last_checkpoint import CHECKPOINT_FORMAT
from deepclust.clustering.assignment_rules import assign_by_own_rule, assign_to_centroids
from deepclust.commands import export
from deepclust.commands.export import main
from deepclust.commands.export_examples import compose_example
from deepclust.commands.export_formats import euclidean_distances, write_onnx, write_torchscript
from deepclust.commands.export_program import Program, drop_unused_tensors, example_images
from deepclust.commands.train import run
from deepclust.config.build import build
from deepclust.errors import InputError
from tests.cli.test_bad_input import run_refused
from tests.conftest import compose_train, compose_verb

METHODS = sorted(p.stem for p in (Path(__file__).parents[2] / "conf/method").glob("*.yaml"))
pytestmark = [pytest.mark.sampled, pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")]
FORMATS = ("torchscript", "onnx", "safetensors")

STRANGER = """
import json, sys
sys.modules["deepclust"] = None  # an import of it fails
import numpy as np, onnxruntime, safetensors, torch
import torch.nn.functional as F

STATISTICS = ("running_mean", "running_var", "weight", "bias")

def network(images, prefix):
    '''conv_small, from the names and shapes of its weights.'''
    x = (torch.from_numpy(images) / 255 - weights["mean"]) / weights["std"]
    for at, pool in ((0, False), (3, True), (7, False), (10, False)):
        x = F.conv2d(x, weights[f"{prefix}{at}.weight"], padding=1)
        x = F.batch_norm(x, *(weights[f"{prefix}{at + 1}.{name}"] for name in STATISTICS)).relu()
        x = F.max_pool2d(x, 2) if pool else x
    return F.adaptive_avg_pool2d(x, 2).flatten(1)

def by_hand(images):
    if "kmeans_centroids" in weights:
        features = network(images, "backbone.layers.")
        distances = (features[:, None] - weights["kmeans_centroids"]).square().sum(2)
        logits = -distances / (2 * weights["kmeans_scale"])
    else:
        features = network(images, "target.backbone.layers.")
        for at in sorted({int(n.split(".")[2]) for n in weights if n.startswith("target.projector.")}):
            layer = {n.split(".")[3]: v for n, v in weights.items() if n.startswith(f"target.projector.{at}.")}
            if layer["weight"].dim() == 2:
                features = F.linear(features, layer["weight"], layer["bias"])
            else:
                features = F.batch_norm(features, *(layer[name] for name in STATISTICS)).relu()
        features = F.normalize(features, dim=1)
        groups = F.normalize(weights["pseudo_labels.centroids"], dim=1)
        logits = features @ groups.T / told["safetensors"]["built_from"]["method"]["temperature"]
    return logits.argmax(1), logits.softmax(1).amax(1), features

folder = sys.argv[1]
images = np.load(f"{folder}/images.npy")
extra = {"deepclust": ""}
scripted = torch.jit.load(f"{folder}/run.torchscript", _extra_files=extra)
session = onnxruntime.InferenceSession(f"{folder}/run.onnx")
with safetensors.safe_open(f"{folder}/run.safetensors", "pt") as file:
    weights = {name: file.get_tensor(name) for name in file.keys()}
    told = {"safetensors": json.loads(file.metadata()["deepclust"])}
told["torchscript"] = json.loads(extra["deepclust"])
told["onnx"] = json.loads(session.get_modelmeta().custom_metadata_map["deepclust"])
results = {"names": np.array([*(n.name for n in session.get_inputs()), *(n.name for n in session.get_outputs())])}
with torch.no_grad():
    for size in (1, len(images)):
        for name, made in (
            ("torchscript", scripted(torch.from_numpy(images[:size]))),
            ("onnx", session.run(None, {"images": images[:size]})),
            ("safetensors", by_hand(images[:size])),
        ):
            results |= {f"{name}{size}_{i}": np.asarray(part) for i, part in enumerate(made)}
np.savez(f"{folder}/results.npz", **results)
json.dump(told, open(f"{folder}/told.json", "w"))
"""


def export_run(*overrides: str) -> Path:
    return main(compose_verb("export", *overrides))


@pytest.mark.parametrize(
    "name, rule",
    [("propos", "cluster_logits"), pytest.param("scan_pretext", "kmeans_centroids", marks=pytest.mark.slow)],
)
def test_a_stranger_gets_the_assignments_of_the_run(name, rule, tmp_path):
    small = ["hardware=cpu", "trainer.max_epochs=1", "report.map_points=60"]
    results = run(compose_train(f"method={name}", *small), tmp_path)
    for form in FORMATS:
        export_run(f"run={tmp_path}", f"format={form}", f"output={tmp_path}/run.{form}")
    np.save(tmp_path / "images.npy", np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[:, None])
    done = subprocess.run([sys.executable, "-I", "-c", STRANGER, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    rows = list(csv.DictReader((tmp_path / "assignments.csv").open()))
    clusters, confidence = (np.array([float(row[key]) for row in rows]) for key in ("cluster", "confidence"))
    made = np.load(tmp_path / "results.npz")
    told = json.loads((tmp_path / "told.json").read_text())
    assert made["names"].tolist() == ["images", "clusters", "confidence", "features"]
    for form in FORMATS:
        for size in (1, 1797):
            parts = [made[f"{form}{size}_{i}"] for i in range(3)]
            assert parts[0].dtype == np.int64 and parts[1].dtype == parts[2].dtype == np.float32
            assert np.array_equal(parts[0], clusters[:size])
            np.testing.assert_allclose(parts[1], confidence[:size], rtol=0, atol=1e-4)
            np.testing.assert_allclose(parts[2], made["torchscript1797_2"][:size], rtol=1e-4, atol=1e-5)
        assert told[form]["input"]["shape"] == ["N", 1, 8, 8] and rule in told[form]["confidence"]
        assert told[form]["method"] == name and told[form]["num_clusters"] == results["num_clusters"] == 10


@pytest.fixture(scope="module")
def scc_run(tmp_path_factory):
    """A run of SCC, which finds the number of its clusters, on the pixels of the digits."""
    folder = tmp_path_factory.mktemp("scc")
    choices = ["method=scc", "backbone=identity", "dataset.num_clusters=auto"]
    run(compose_train(*choices, "hardware=cpu", "report.map_points=0"), folder)
    return folder


@pytest.mark.parametrize("form", ["torchscript", "onnx"])
def test_scc_gives_the_assignments_of_its_run(form, scc_run, tmp_path):
    export_run(f"run={scc_run}", f"format={form}", f"output={tmp_path}/program")
    images = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)[:, None]
    if form == "torchscript":
        clusters, confidence, _ = torch.jit.load(tmp_path / "program")(torch.from_numpy(images))
    else:
        clusters, confidence, _ = onnxruntime.InferenceSession(tmp_path / "program").run(None, {"images": images})
    rows = list(csv.DictReader((scc_run / "assignments.csv").open()))
    assert len({row["cluster"] for row in rows}) > 1
    assert clusters.tolist() == [int(row["cluster"]) for row in rows]
    np.testing.assert_allclose(confidence, [float(row["confidence"]) for row in rows], rtol=0, atol=1e-4)


def make_untrained_program(*overrides: str, height: int, width: int):
    """A program with random weights, an example, and other images with what the package makes of them."""
    cfg = compose_train("dataset.num_images=50", *overrides)
    if cfg.before is not None:
        cfg.earlier.method = cfg.before.method
    torch.manual_seed(0)
    method, views = build(cfg.method).eval(), build(cfg.multi_view)
    for key, value in method.named_buffers():
        if key.endswith(("centroids", "running_mean")):
            value.normal_()
        if key.endswith("best_head"):
            value.fill_(cfg.method.get("num_heads", 1) // 2)
    example = example_images(cfg, [height, width])
    images = torch.cat([example, example]).flip(0, 1, 3)[1:]
    features = method.encode_all([views.clean(images)], 5)
    centroids, scale = torch.randn(cfg.dataset.num_clusters, features.shape[1]), torch.tensor(3.0)
    own = assign_by_own_rule(method.cluster_logits, features, num_clusters=method.num_clusters)
    own = own or assign_to_centroids(features, centroids, scale)
    program = Program(method=method, views=views, centroids=centroids, scale=scale).eval().requires_grad_(False)
    drop_unused_tensors(program, example)
    return program, example, images, (*own, features)


def assert_repeats(write, program, example, images, expected, tmp_path):
    file = tmp_path / "program"
    write(program, example, {}, file)
    if write is write_torchscript:
        got = torch.jit.load(file)(images)
    else:
        got = [
            torch.from_numpy(part) for part in onnxruntime.InferenceSession(file).run(None, {"images": images.numpy()})
        ]
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"rgc"}))  # which has no rule for new images
def test_every_method_as_torchscript(name, tmp_path):
    made = make_untrained_program("dataset=digits", f"method={name}", height=8, width=8)
    assert_repeats(write_torchscript, *made, tmp_path)


def test_a_rule_that_is_not_ready_gives_way_to_k_means_as_onnx(tmp_path):
    program, *made = make_untrained_program("dataset=digits", "method=lnscc", height=8, width=8)  # no centres are set
    assert "kmeans_centroids" in program.state_dict()
    assert_repeats(write_onnx, program, *made, tmp_path)


@pytest.mark.parametrize("write", [write_torchscript, write_onnx])
def test_colour_images_of_another_shape_and_the_best_of_several_heads(write, tmp_path):
    sizes = ["dataset=cifar10", "backbone=conv_small", "dataset.image_size=20", "method.num_heads=3"]
    made = make_untrained_program("method=scan", *sizes, "views=byol", "view_names=[first]", height=41, width=48)
    assert any("heads.1." in key for key in made[0].state_dict())
    assert_repeats(write, *made, tmp_path)


def test_a_run_on_vectors_takes_vectors(tmp_path):
    vectors = ["dataset=features", "dataset.path=none", "dataset.channels=7", "dataset.num_clusters=3"]
    program, example, images, expected = make_untrained_program(*vectors, "method=kmeans", height=1, width=1)
    assert images.dtype == torch.float32 and images.shape == (5, 7, 1, 1)
    assert torch.equal(expected[2], images.flatten(1))
    assert_repeats(write_torchscript, program, example, images, expected, tmp_path)


def test_nothing_is_kept_that_no_result_hangs_on():
    program, *_ = make_untrained_program("dataset=digits", "method=propos", height=8, width=8)
    kept = {key.split(".")[1] for key in program.state_dict() if key.startswith("method.")}
    assert kept == {"target", "pseudo_labels"}
    assert "method.pseudo_labels.assignments" not in program.state_dict()


def test_distances_far_from_the_origin():
    rows, others = torch.randn(6, 5) + 1000, torch.randn(4, 5) + 1000
    expected = torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(euclidean_distances(rows, others), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError):
        euclidean_distances(rows, others, p=1.0)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    run(compose_train("method=kmeans", "hardware=cpu", "report.map_points=0"), folder)
    return folder


@pytest.mark.parametrize("form", FORMATS)
def test_example_beside_the_file_runs_as_it_stands(form, small_run, tmp_path, capsys):
    output = tmp_path / "new" / "it's \u00e4 model"
    export_run(f"run={small_run}", f"format={form}", f"output='{str(output).replace(chr(39), chr(92) + chr(39))}'")
    example = output.with_name(output.name + ".example.py")
    assert sorted(path.name for path in output.parent.iterdir()) == sorted([output.name, example.name])
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0].startswith(f"{form}, ") and lines[0].endswith(str(output))
    shown = "in: images uint8 (N, 1, 8, 8); 0 to 255, not normalised; floats are refused; channels: grey; other sizes: "
    assert lines[1].startswith(shown)
    assert lines[2].startswith("out: clusters int64 (N) from 0 to 9, confidence float32 (N) from 0 to 1, features ")
    assert lines[3] == f"how to load it: {example}"

    picture = tmp_path / "wide.png"
    Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save(picture)
    moved = output.parent.rename(tmp_path / "moved")  # the example finds the file where both are
    no_deepclust = "import runpy, sys; sys.modules['deepclust'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0])"
    for pictures in ([], [str(picture)]):
        command = [sys.executable, "-I", "-c", no_deepclust, str(moved / example.name), *pictures]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "kmeans" in done.stdout
        if form != "safetensors":
            assert len(re.findall(r"cluster \d with confidence [01]\.\d{3}", done.stdout)) == (1 if pictures else 3)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
@pytest.mark.parametrize("form", FORMATS)
def test_files_have_ordinary_modes(form, umask, mode, small_run, tmp_path):
    before = os.umask(umask)
    try:
        export_run(f"run={small_run}", f"format={form}", f"output={tmp_path}/run.{form}")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_nothing_lies_beside_an_output_that_is_no_file(small_run, tmp_path, capfd):
    export_run(f"run={small_run}", "format=safetensors", "output=/dev/null")
    assert "how to load" not in capfd.readouterr().out and not Path("/dev/null.example.py").exists()
    longest = tmp_path / ("n" * 255)
    export_run(f"run={small_run}", "format=safetensors", f"output={longest}")
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "m.pt.example.py").mkdir()
    with pytest.raises(InputError, match=r"example\.py is a folder"):
        export_run(f"run={small_run}", "format=safetensors", f"output={tmp_path}/m.pt")
    assert not (tmp_path / "m.pt").exists()


@pytest.mark.parametrize("write", [write_torchscript, write_onnx])
def test_what_a_program_would_misread_is_refused(write, tmp_path):
    program, example, images, _ = make_untrained_program("dataset=digits", "method=cc", height=8, width=8)
    write(program, example, {}, tmp_path / "program")
    if write is write_torchscript:
        call = torch.jit.load(tmp_path / "program")
    else:
        session = onnxruntime.InferenceSession(tmp_path / "program")
        call = lambda batch: session.run(None, {"images": batch.numpy()})  # noqa: E731
    assert len(call(images)[0]) == len(images)
    wrong = {
        "floats of 0 to 1": images / 255,
        "floats of 0 to 255": images.float(),
        "half": images.half(),
        "64 bits": images.long(),
        "one image": images[0],
        "channels last": images.permute(0, 2, 3, 1),
        "three channels": images.repeat(1, 3, 1, 1),
        "another size": images.repeat(1, 1, 2, 2),
    }
    for name, batch in wrong.items():
        with pytest.raises(Exception) as error:  # onnxruntime has many kinds
            call(batch)
        if write is write_torchscript:
            assert "expected uint8, from 0 to 255 and not normalised, of the shape (N, 1, 8, 8)" in str(error.value), (
                name
            )


def test_a_program_for_vectors_takes_floats_only(tmp_path):
    vectors = ["dataset=features", "dataset.path=none", "dataset.channels=7", "dataset.num_clusters=3"]
    program, example, images, _ = make_untrained_program(*vectors, "method=kmeans", height=1, width=1)
    write_torchscript(program, example, {}, tmp_path / "program")
    call = torch.jit.load(tmp_path / "program")
    assert len(call(images)[0]) == 5
    for batch in (images.to(torch.uint8), images[:, :6], images.flatten(1)):
        with pytest.raises(torch.jit.Error, match=r"expected floats of the shape \(N, 7, 1, 1\)"):
            call(batch)


def test_example_for_vectors_runs(tmp_path):
    vectors = ["dataset=features", "dataset.path=none", "dataset.channels=7", "dataset.num_clusters=3"]
    program, example, _, _ = make_untrained_program(*vectors, "method=kmeans", height=1, width=1)
    taken = {"dtype": "float32", "shape": ["N", 7, 1, 1]}
    write_torchscript(program, example, {"input": taken, "method": "kmeans"}, tmp_path / "run.pt")
    (tmp_path / "example.py").write_text(compose_example("torchscript", tmp_path / "run.pt"))
    np.save(tmp_path / "new.npy", np.zeros((4, 7)))
    command = [sys.executable, "-I", str(tmp_path / "example.py"), str(tmp_path / "new.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("cluster ") == 4, done.stderr


def test_refusals(tmp_path, monkeypatch, capfd):
    where = [f"run={tmp_path}", f"output={tmp_path}/out"]
    assert "last.ckpt" in run_refused(monkeypatch, capfd, "export", *where, "format=onnx")
    (tmp_path / "checkpoints").mkdir()
    torch.save({"format": CHECKPOINT_FORMAT}, tmp_path / "checkpoints/last.ckpt")
    assert "safetensors" in run_refused(monkeypatch, capfd, "export", *where, "format=pickle")
    monkeypatch.setitem(export.REQUIRED_PACKAGES, "onnx", ("no_such_package",))
    assert "pip install no_such_package" in run_refused(monkeypatch, capfd, "export", *where, "format=onnx")
    assert "finished" in run_refused(monkeypatch, capfd, "export", *where, "format=torchscript")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["large", [3, 4, 5], 0])
def test_a_size_that_is_none(size):
    with pytest.raises(InputError, match="image_size"):
        example_images(compose_train(), size)
