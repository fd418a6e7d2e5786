"""A run in the form of a model on the Hugging Face Hub, from a folder and over HTTP, is the run."""

import contextlib
import copy
import functools
import http.server
import io
import json
import os
import re
import resource
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from sklearn.datasets import load_digits

from deepclust.commands import evaluate, export, features, predict
from deepclust.config.build import build
from deepclust.config.plain_values import resolve_to_dict
from deepclust.errors import InputError
from deepclust.runs.checkpoint import load_checkpoint, load_finished_checkpoint, load_method
from deepclust.runs.hub_form import find_paths, read_hub_form, write_hub_form
from deepclust.runs.locate_run import is_on_hub, locate_run
from deepclust.runs.model_card import compose_model_card
from deepclust.runs.run_folder import CHECKPOINT, HUB_CARD, HUB_CONFIG, HUB_WEIGHTS, RESULTS
from tests.conftest import SMALL_RUN, compose_train, compose_verb
from tests.processes import PROGRAM

METHODS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf/method").glob("*.yaml"))
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {HUB_CARD, HUB_CONFIG, HUB_WEIGHTS, RESULTS}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A finished run with a rule of its own, and images to predict."""
    from deepclust.commands.train import run

    folder = tmp_path_factory.mktemp("finished")
    data = f"data_dir={folder}/my_data"
    run(compose_train(*SMALL_RUN, "trainer.max_epochs=1", "report.map_points=0", data), folder)
    np.save(folder / "images.npy", (load_digits().images[:300] * 15.9).astype(np.uint8))
    return folder


@pytest.fixture(scope="module")
def hub_folder(run_folder, tmp_path_factory) -> Path:
    """The run in the form of the Hub."""
    folder = tmp_path_factory.mktemp("hub") / "new/model"
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        export_run(f"run={run_folder}", "format=hub", f"output={folder}", "license=mit")
    assert f"{folder}" in shown.getvalue() and "hf upload" in shown.getvalue()
    return folder


@pytest.fixture
def copied(hub_folder, tmp_path) -> Path:
    return shutil.copytree(hub_folder, tmp_path / "copied")


def export_run(*arguments: str) -> Path:
    return export.main(compose_verb("export", *arguments))


def run_program(program: str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


def assert_refused(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("deepclust: error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def test_the_folder_holds_what_the_hub_expects(hub_folder, run_folder):
    assert {path.name for path in hub_folder.iterdir()} == FILES
    assert json.loads((hub_folder / RESULTS).read_text()) == json.loads((run_folder / RESULTS).read_text())
    from safetensors import safe_open

    with safe_open(hub_folder / HUB_WEIGHTS, "pt") as file:
        assert {"kmeans_centroids", "kmeans_scale", "cluster_means"} < set(file.keys())
        assert file.metadata() == {"format": "pt"}
    config = (hub_folder / HUB_CONFIG).read_text()
    assert json.loads(config)["library_name"] == "deepclust"
    assert "my_data" not in config, "folders of this machine are nobody's business"
    assert json.loads(config)["config"]["data_dir"] == "data"


def test_the_model_card(hub_folder, run_folder):
    _, header, text = (hub_folder / HUB_CARD).read_text().split("---\n", 2)
    header, results = yaml.safe_load(header), json.loads((run_folder / RESULTS).read_text())
    assert header["library_name"] == "deepclust" and header["license"] == "mit"
    assert header["datasets"] == ["digits"] and header["metrics"] == ["accuracy", "nmi", "ari"]
    assert {"image-clustering", "propos"} <= set(header["tags"])
    (result,) = header["model-index"][0]["results"]
    told = {(metric["type"], metric["value"]) for metric in result["metrics"]}
    assert ("accuracy", results["scores"]["method"]["acc"]) in told and len(result["metrics"]) == 6
    for part in (
        "**Warning:** the licence of the data set `digits` is unknown",
        f"{results['scores']['kmeans']['nmi']:.4f}",
        str(results["commit"]),
        f"torch {results['versions']['torch']}",
        "deepclust predict run=hf://OWNER/NAME",
        'deepclust.load_run("hf://OWNER/NAME")',
        "`propos`",
        "1797 images",
    ):
        assert part in text, part


def test_the_card_reads_as_the_hub_library_reads_it(hub_folder):
    from huggingface_hub import ModelCard

    card = ModelCard(hub_folder.joinpath(HUB_CARD).read_text())
    assert card.data.library_name == "deepclust" and card.data.license == "mit"
    assert {score.metric_type for score in card.data.eval_results} == {"accuracy", "nmi", "ari"}


def test_cards_of_a_known_licence_and_of_a_run_without_scores():
    config = resolve_to_dict(compose_train("dataset=digits"))
    card = compose_model_card(config, None, license=None, dataset_license="cc-by-4.0")
    assert "Warning" not in card and "cc-by-4.0" in card and "no labels" in card
    header = yaml.safe_load(card.split("---\n")[1])
    assert "license" not in header and "model-index" not in header


@pytest.fixture(scope="module")
def images(run_folder) -> str:
    return f"images={run_folder / 'images.npy'}"


def test_every_verb_gives_the_same_bit_for_bit(hub_folder, run_folder, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, run in (("run", run_folder), ("hub", hub_folder)):
        predict.main(compose_verb("predict", f"run={run}", images, f"output={name}.csv"))
        features.main(compose_verb("features", f"run={run}", f"output={name}_features"))
        export.main(compose_verb("export", f"run={run}", "format=safetensors", f"output={name}.safetensors"))
    for file in ("{}.csv", "{}_features/train_features.npy", "{}.safetensors"):
        assert Path(file.format("run")).read_bytes() == Path(file.format("hub")).read_bytes()
    of_run, of_hub = (evaluate.main(compose_verb("evaluate", f"run={run}")) for run in (run_folder, hub_folder))
    assert of_run["scores"] == of_hub["scores"]


def test_a_stage_starts_from_it(hub_folder, run_folder):
    from deepclust.runs.earlier_stage import describe_earlier_run

    of_hub, of_run = (describe_earlier_run(folder) for folder in (hub_folder, run_folder))
    assert of_hub["sha256"] == of_run["sha256"] and of_hub["method"] == of_run["method"]


def test_exported_again_it_stays_the_same(hub_folder, tmp_path):
    export.main(compose_verb("export", f"run={hub_folder}", "format=hub", f"output={tmp_path}/again", "license=mit"))
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (hub_folder / name).read_bytes()


def test_from_python(hub_folder, run_folder):
    import deepclust

    of_hub, of_run = deepclust.load_run(hub_folder), deepclust.load_run(run_folder)
    images = np.load(run_folder / "images.npy")
    assert np.array_equal(of_hub.predict(images).labels_, of_run.predict(images).labels_)
    assert of_hub.scores == of_run.scores and "1797" in repr(of_hub)


@pytest.mark.parametrize("name", METHODS)
def test_weights_and_configuration_of_every_method_are_kept(name, tmp_path):
    cfg = compose_train(f"method={name}", "dataset=digits", "dataset.num_images=50")
    if cfg.before is not None:
        cfg.earlier.method = cfg.before.method
    config, method = resolve_to_dict(cfg), build(cfg.method)
    state = {
        "kmeans_centroids": torch.rand(10, 4),
        "kmeans_scale": torch.tensor(0.3),
        "cluster_means": torch.rand(10, 4),
    }
    checkpoint = {"format": 2, "config": config, "state_dict": method.state_dict(), **state}
    write_hub_form(tmp_path, checkpoint, None, "card")
    again = load_finished_checkpoint(tmp_path)
    assert again["config"] == {**config, "data_dir": again["config"]["data_dir"]}
    expected = checkpoint["state_dict"] | state
    found = again["state_dict"] | {key: again[key] for key in state}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
    loaded = load_method(again)[1].state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in checkpoint["state_dict"].items())


def test_paths_of_this_machine_are_found():
    document = {
        "a": {"path": "/home/me/photos", "rate": "1/2"},
        "command": "deepclust train dataset.path=/srv/x",
        "b": "~/x",
    }
    assert [found.partition("=")[0] for found in find_paths(document)] == ["a.path", "command", "b"]


@pytest.mark.parametrize("umask, file_mode, folder_mode", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_modes_are_those_of_ordinary_files(run_folder, tmp_path, umask, file_mode, folder_mode, there):
    output, before = tmp_path / "model", os.umask(umask)
    try:
        if there:
            output.mkdir()
        export_run(f"run={run_folder}", "format=hub", f"output={output}")
    finally:
        os.umask(before)
    assert stat.S_IMODE(output.stat().st_mode) == folder_mode
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in output.iterdir()} == dict.fromkeys(
        FILES, file_mode
    )


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_nothing(run_folder, tmp_path):
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (50_000, 50_000))
    command = [sys.executable, "-c", PROGRAM, "export", f"run={run_folder}", "format=hub", f"output={tmp_path}/model"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert_refused(done, "File too large")
    assert not list(tmp_path.iterdir())


def test_export_refusals(run_folder, hub_folder, tmp_path):
    common = [f"run={run_folder}", "format=hub"]
    for output in (hub_folder, hub_folder / HUB_CARD, tmp_path / ("a" * 300)):
        with pytest.raises(InputError, match="output"):
            export_run(*common, f"output={output}")
    with pytest.raises(InputError, match="image_size says nothing"):
        export_run(*common, f"output={tmp_path}/model", "image_size=9")
    with pytest.raises(InputError, match="dataset_license says nothing"):
        export_run(f"run={run_folder}", "format=onnx", f"output={tmp_path}/model", "dataset_license=mit")
    assert not list(tmp_path.iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change(**values):
    def rewrite(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return rewrite


@pytest.mark.parametrize(
    "name, damage, part",
    [
        (HUB_WEIGHTS, cut, HUB_WEIGHTS),
        (HUB_WEIGHTS, lambda path: path.write_bytes(b""), HUB_WEIGHTS),
        (HUB_CONFIG, cut, HUB_CONFIG),
        (HUB_CONFIG, lambda path: path.write_text("[]"), HUB_CONFIG),
        (HUB_CONFIG, lambda path: path.write_text("[" * 100_000), HUB_CONFIG),
        (HUB_CONFIG, lambda path: path.write_bytes(b"\xff\xfe"), HUB_CONFIG),
        (HUB_CONFIG, lambda path: (path.unlink(), os.mkfifo(path)), HUB_CONFIG),
        (HUB_CONFIG, change(library_name="timm"), "not of deepclust"),
        (HUB_CONFIG, change(format=1), "format 1"),
        (HUB_CONFIG, change(format=None), "format None"),
        (HUB_CONFIG, change(config=None), "section config"),
        (HUB_CONFIG, change(config={"method": {}}), "lacks"),
    ],
)
def test_damaged_files_are_refused(copied, name, damage, part):
    damage(copied / name)
    with pytest.raises(InputError, match=re.escape(part)) as error:
        load_method(load_checkpoint(copied))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_no_run(copied):
    (copied / HUB_WEIGHTS).unlink()
    with pytest.raises(InputError, match=CHECKPOINT):
        load_checkpoint(copied)


def test_weights_without_what_assigns_are_refused(copied):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copied / HUB_WEIGHTS)
    save_file({**tensors, "kmeans_scale": torch.ones(2)}, copied / HUB_WEIGHTS)
    with pytest.raises(InputError, match=HUB_WEIGHTS):
        load_finished_checkpoint(copied)
    del tensors["kmeans_centroids"]
    save_file(tensors, copied / HUB_WEIGHTS)
    with pytest.raises(InputError, match="not a finished run"):
        load_finished_checkpoint(copied)


def put_gadget(folder: Path, marker: Path) -> None:
    """Let the configuration of a shared run name a command."""
    document = json.loads((folder / HUB_CONFIG).read_text())
    document["config"]["method"]["optimizer"] = {"_target_": "os.system", "_args_": [f"touch {marker}"]}
    (folder / HUB_CONFIG).write_text(json.dumps(document))


def test_a_stranger_s_folder_runs_nothing(copied, images, tmp_path):
    put_gadget(copied, tmp_path / "marker")
    with pytest.raises(InputError, match=r"method\.optimizer\._target_=os\.system.* does not build"):
        predict.main(compose_verb("predict", f"run={copied}", images, f"output={tmp_path}/out.csv"))
    assert not (tmp_path / "marker").exists() and not (tmp_path / "out.csv").exists()


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the Hub that a download needs, of the folders below `root`."""

    root: Path
    requests: list[str]

    def log_message(self, *arguments) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        self.requests.append(f"{self.command} {self.path}")
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/]+)", self.path)
        code, headers = None, {"X-Repo-Commit": COMMIT}
        if found is None or not (self.root / found[1]).is_dir():
            code = "RepoNotFound"
        elif found[2] not in ("main", "v1", COMMIT):
            code = "RevisionNotFound"
        elif not (self.root / found[1] / found[3]).is_file():
            code = "EntryNotFound"
        if code is not None:
            self.send_response(404)
            headers |= {"X-Error-Code": code, "Content-Length": "0"}
            content = b""
        else:
            content = (self.root / found[1] / found[3]).read_bytes()
            self.send_response(200)
            headers |= {"ETag": f'"{len(content)}-{found[3]}"', "Content-Length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@pytest.fixture
def hub(copied, tmp_path):
    """A server with the model owner/name; gives what a process needs to find it, and the requests that it got."""
    shutil.copytree(copied, tmp_path / "hub/owner/name")
    handler = type("OwnHub", (Hub,), {"root": tmp_path / "hub", "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"), "")
    yield (
        {
            **proxies,
            "no_proxy": "127.0.0.1",
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hf"),
        },
        handler.requests,
    )
    server.shutdown()
    server.server_close()


def locate_in_process(variables: dict[str, str], *names: str) -> list[str]:
    """Return, for each name, the folder of the run or the error, of one process that knows the hub as `variables`."""
    program = (
        "import sys\nfrom deepclust.errors import InputError\nfrom deepclust.runs.locate_run import locate_run\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        print(locate_run(name))\n    except InputError as error:\n        print(error)\n"
    )
    done = run_program(program, *names, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def list_fetched(requests: list[str]) -> list[str]:
    return sorted(request for request in requests if request.startswith("GET") and "/resolve/" in request)


@pytest.mark.slow
def test_over_http_it_is_the_run(hub, run_folder, images, tmp_path, copied):
    variables, requests = hub
    predict.main(compose_verb("predict", f"run={run_folder}", images, f"output={tmp_path}/run.csv"))
    command = ["predict", "run=hf://owner/name", images, f"output={tmp_path}/hub.csv"]
    done = run_program(PROGRAM, *command, **variables)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hub.csv").read_bytes() == (tmp_path / "run.csv").read_bytes()
    fetched = list_fetched(requests)
    assert [request.rpartition("/")[2] for request in fetched] == [HUB_WEIGHTS, RESULTS, HUB_CONFIG], "nothing else"
    assert f"GET /owner/name/resolve/{COMMIT}/{HUB_WEIGHTS}" in fetched, "all files are those of one commit"

    main, v1 = locate_in_process(variables, "hf://owner/name", "hf://owner/name@v1")
    assert main == v1 and COMMIT in main and list_fetched(requests) == fetched, "what is there is not fetched again"
    for name in (HUB_CONFIG, HUB_WEIGHTS, RESULTS):
        assert (Path(main) / name).read_bytes() == (copied / name).read_bytes()
    offline = {**variables, "HF_HUB_OFFLINE": "1"}
    assert locate_in_process(offline, "hf://owner/name") == [main], "no network is needed for what is there"


def test_over_http_a_stranger_runs_nothing(hub, images, tmp_path):
    variables, _ = hub
    put_gadget(tmp_path / "hub/owner/name", tmp_path / "marker")
    done = run_program(PROGRAM, "predict", "run=hf://owner/name", images, f"output={tmp_path}/out.csv", **variables)
    assert done.returncode == 2 and not (tmp_path / "marker").exists()
    assert "method.optimizer._target_=os.system" in done.stderr.splitlines()[-1]


def test_what_is_not_on_the_hub(hub, tmp_path):
    variables, _ = hub
    (tmp_path / "hub/owner/empty").mkdir()
    (tmp_path / "hub/owner/name" / RESULTS).unlink()
    names = ["hf://nobody/name", "hf://owner/empty", "hf://owner/name@v9", "hf://owner/name"]
    nobody, empty, revision, found = locate_in_process(variables, *names)
    assert "config.json of hf://nobody/name cannot be downloaded: RepositoryNotFoundError" in nobody
    assert "EntryNotFoundError" in empty and "RevisionNotFoundError" in revision
    assert {path.name for path in Path(found).iterdir()} == {HUB_CONFIG, HUB_WEIGHTS}, "results may be missing"
    assert locate_in_process({**variables, "HF_HUB_OFFLINE": "1"}, "hf://owner/name") == [found]


@pytest.mark.slow
def test_without_a_network_there_is_one_line(tmp_path):
    arguments = ["predict", "run=hf://owner/name", f"images={tmp_path}", f"output={tmp_path}/out"]
    done = run_program(PROGRAM, *arguments, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert_refused(done, "config.json of hf://owner/name cannot be downloaded", "the network")


def test_without_the_package_one_line_says_what_to_install(tmp_path):
    program = "import sys; sys.modules['huggingface_hub'] = None\n" + PROGRAM
    done = run_program(program, "predict", "run=hf://owner/name", f"images={tmp_path}", f"output={tmp_path}/out")
    assert_refused(done, "pip install huggingface_hub")


@pytest.mark.parametrize(
    "name", ["hf://", "hf://name", "hf://a/b/c", "hf://a/b@", "hf://../x", "hf://a/b@../x", "hf://a b/c"]
)
def test_names_that_are_none(name):
    assert is_on_hub(name)
    with pytest.raises(InputError, match="hf://OWNER/NAME"):
        locate_run(name)


def test_a_folder_is_where_it_is(tmp_path):
    assert locate_run(str(tmp_path)) == locate_run(tmp_path) == tmp_path
    assert is_on_hub(Path("hf://owner/name")) and not is_on_hub("hf") and not is_on_hub(tmp_path)


def test_the_configuration_of_a_shared_run_is_read_as_plain_values(copied):
    config = read_hub_form(copied)["config"]
    assert OmegaConf.to_container(OmegaConf.create(copy.deepcopy(config))) == config
