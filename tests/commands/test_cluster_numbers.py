"""`deepclust cluster` with several numbers of clusters, and with `sort_to`: the features are computed once."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from sklearn.datasets import load_digits

from deepclust.cli.arguments import quote_path
from deepclust.commands.cluster import cluster
from deepclust.errors import InputError
from deepclust.runs.inputs_in_memory import write_pictures
from deepclust.runs.locate_run import locate_run

SHORT = ["hardware=cpu", "num_seeds=1", "report.map_points=0", "rule=kmeans", "images=x"]
OWN = ["network=own", "images_seen=30", "min_epochs=1", "dataset.image_size=16", "own_network.backbone.widths=[8,16]"]
OWN += ["own_network.backbone.pool_after=[1,2]"]


def call(folder: Path, images: Path, *overrides: str) -> dict:
    folder.mkdir(exist_ok=True, parents=True)
    with initialize_config_module("deepclust.conf", version_base="1.3"):
        cfg = compose("cluster", overrides=[*SHORT, *overrides])
        cfg.images = str(images)
        return cluster(cfg, folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    write_pictures([Image.fromarray((digit * 15).astype(np.uint8)) for digit in load_digits().images[:30]], folder, "x")
    return folder


def test_several_numbers_are_one_report_with_tabs_and_one_run_each(tmp_path, capsys):
    assert quote_path("num_clusters=5,10,20", is_sweep=False, verb="cluster") == "num_clusters=[5,10,20]"
    assert quote_path("num_clusters=5,10", is_sweep=True, verb="cluster") == "num_clusters=5,10"
    np.save(tmp_path / "rows.npy", load_digits().data[:200].astype(np.float32))
    folder = tmp_path / "run"
    results = call(folder, tmp_path / "rows.npy", "num_clusters=[4,2,3]")
    assert results["num_clusters"] == 4 and "2 clusters, in " in capsys.readouterr().out
    made = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}
    assert call(folder, tmp_path / "rows.npy", "num_clusters=[4,2,3]") == results
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()} == made
    page = (folder / "report.html").read_text()
    assert page.count("<iframe") == 3 and page.index(">4 clusters<") < page.index(">2 clusters<")
    assert page.count("numbers/2/") == 1  # where the links of that report begin
    for number in (2, 3):
        place = folder / "numbers" / str(number)
        assert locate_run(place) == place
        with (place / "assignments.csv").open(newline="") as file:
            assert len({row["cluster"] for row in csv.DictReader(file)}) == number
        alone = call(tmp_path / f"alone{number}", tmp_path / "rows.npy", f"num_clusters={number}")
        assert json.loads((place / "results.json").read_text())["health"] == alone["health"]
    assert not list((folder / "numbers" / "2").glob("features"))


@pytest.mark.parametrize("action", ["copy", "link", "move"])
def test_photos_are_sorted_without_computing_features_twice(photos, tmp_path, action):
    own = shutil.copytree(photos, tmp_path / "own photos")
    with pytest.raises(InputError, match="set another sort_to"):
        call(tmp_path / "run", own, *OWN, "num_clusters=2", f"sort_to='{own}/sorted'")
    with pytest.raises(InputError, match="one number of clusters to sort by"):
        call(tmp_path / "run", own, *OWN, "num_clusters=[2,3]", f"sort_to={tmp_path}/sorted")
    if action == "copy":
        call(tmp_path / "run", own, *OWN, "num_clusters=2")
        made = (tmp_path / "run" / "features" / "train_features.npy").stat().st_mtime_ns
    contents = sorted(file.read_bytes() for file in own.iterdir())
    call(tmp_path / "run", own, *OWN, "num_clusters=2", f"sort_to={tmp_path}/sorted", f"sort_action={action}")
    if action == "copy":
        assert (tmp_path / "run" / "features" / "train_features.npy").stat().st_mtime_ns == made
    sorted_files = list((tmp_path / "sorted").glob("cluster_00[01]/*"))
    assert sorted(file.read_bytes() for file in sorted_files) == contents
    assert all(file.is_symlink() == (action == "link") for file in sorted_files)
    assert len(list(own.iterdir())) == (0 if action == "move" else 30)
    with pytest.raises(InputError, match="is not empty"):
        call(tmp_path / "run", photos, *OWN, "num_clusters=2", f"sort_to={tmp_path}/sorted")


@pytest.mark.slow
def test_other_clusters_that_were_stopped_do_not_pass_for_the_earlier_ones(tmp_path, monkeypatch):
    np.save(tmp_path / "rows.npy", load_digits().data[:100].astype(np.float32))
    folder = tmp_path / "run"
    expected = call(folder, tmp_path / "rows.npy", "num_clusters=4")
    (folder / "names.json").write_text(names := json.dumps({"0": "mine"}))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("deepclust.commands.cluster_model.write_run", stop)
        call(folder, tmp_path / "rows.npy", "num_clusters=3")
    assert not (folder / "results.json").exists(), "the checkpoint is that of other clusters"
    assert call(folder, tmp_path / "rows.npy", "num_clusters=4")["health"] == expected["health"]
    with (folder / "assignments.csv").open(newline="") as file:
        assert len({row["cluster"] for row in csv.DictReader(file)}) == 4
    assert not (folder / "results-of-earlier-clusters.json").exists()
    assert (folder / "names-of-earlier-clusters.json").read_text() == names
    assert json.loads((folder / "names.json").read_text()) == {}  # vectors have none


def stop(*arguments: object, **named: object) -> None:
    raise KeyboardInterrupt
