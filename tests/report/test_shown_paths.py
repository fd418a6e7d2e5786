"""Paths in a report: relative ones, and nothing that tells where somebody works."""

from pathlib import Path

import pytest

from deepclust.report.shown_paths import hide_places, hide_places_in_command, show_image_paths


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a working directory in it."""
    home = tmp_path / "home" / "ann"
    (home / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    return home


def test_images_beside_the_report_are_named_and_linked_from_there(home: Path) -> None:
    root, folder = home / "work" / "my photos", home / "work" / "outputs" / "run"
    root.mkdir()
    paths = [str(root / "a b.jpg"), str(root / "sub" / "50%.jpg"), str(root / "caf\udce9.jpg")]
    shown = show_image_paths(paths, folder, root=root, absolute=False)
    assert shown.names == ["a b.jpg", "sub/50%.jpg", "caf\udce9.jpg"] and shown.link is not None
    links = [shown.link(index) for index in range(3)]
    assert links == ["../../my%20photos/a%20b.jpg", "../../my%20photos/sub/50%25.jpg", "../../my%20photos/caf%E9.jpg"]
    assert show_image_paths(paths[:1], folder, root=None, absolute=False).names == ["a b.jpg"]
    assert show_image_paths(None, folder, root=root, absolute=False).names is None


def test_files_elsewhere_have_names_and_no_links_unless_asked_for(home: Path) -> None:
    paths = [str(home / "pictures" / "cats" / "1.jpg"), "/media/disk/2.jpg"]
    shown = show_image_paths(paths, home / "run", root=None, absolute=False)
    assert shown.names == ["cats/1.jpg", "disk/2.jpg"] and shown.link is None
    elsewhere = show_image_paths(paths[:1], Path("/media/report"), root=home / "pictures", absolute=False)
    assert elsewhere.link is None
    shown = show_image_paths(paths, home / "run", root=None, absolute=True)
    assert shown.names == paths and shown.link is not None and shown.link(1) == "file:///media/disk/2.jpg"


def test_configurations_and_commands_show_no_places(home: Path) -> None:
    folder = home / "work" / "outputs" / "run"
    config = {
        "path": str(home / "pictures, old" / "x y"),
        "data_dir": str(folder / "data"),
        "weights": ["/media/ann disk/w.pth", f"{home}/work/w.pth", 3, None],
        "url": "https://example.org/a/b",
        "relative": "images/second",
        "share": "1/2",
    }
    assert hide_places(config, folder) == {
        "path": "~/pictures, old/x y",
        "data_dir": "data",
        "weights": ["…/w.pth", "w.pth", 3, None],
        "url": "https://example.org/a/b",
        "relative": "images/second",
        "share": "1/2",
    }
    command = (
        f"deepclust cluster 'images={home}/My Photos' num_clusters=3 backbone.weights=/media/d/w.pth x=[{home}/a/b]"
    )
    shown = hide_places_in_command(command, folder)
    assert shown == "deepclust cluster 'images=~/My Photos' num_clusters=3 'backbone.weights=…/w.pth' 'x=[~/a/b]'"
    assert hide_places_in_command(["deepclust", "train", f"run={folder}"], folder) == "deepclust train run=."
    assert str(home) not in hide_places_in_command(f"broken 'quote {home}/x", folder)
