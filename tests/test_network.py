"""No command uses the network unless it is asked to, and what the environment keeps secret is written nowhere."""

import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from deepclust.cli.main import main

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
SMALL = ["hardware=cpu", "report.map_points=0"]


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What this process looks up or connects to, all of which fails."""
    asked: list[object] = []

    def refuse(*arguments: object, **named: object) -> None:
        asked.append(arguments)
        raise OSError("the test allows no connections")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


def test_commands_use_no_network_and_write_no_secrets(connections, tmp_path: Path, monkeypatch, capfd) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "geheim")
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, pixels in enumerate(load_digits().images[:40]):
        Image.fromarray(np.uint8(pixels * 15)).save(photos / f"{number}.png")
    own = ["network=own", "rule=kmeans", "pretrained=false", "num_seeds=1", "images_seen=40", "min_epochs=1"]
    own += ["min_steps=1", "dataset.image_size=16", "own_network.backbone.widths=[8,16]"]
    own += ["own_network.backbone.pool_after=[1,2]"]
    run = f"{tmp_path}/run"
    for arguments in (
        ["train", "method=kmeans", *SMALL, f"hydra.run.dir={run}"],
        ["evaluate", f"run={run}", "accelerator=cpu"],
        ["compare", f"runs={run}", f"output={tmp_path}/table.html"],
        ["cluster", f"images={photos}", "num_clusters=2", *own, *SMALL, f"hydra.run.dir={tmp_path}/clusters"],
        ["predict", f"run={tmp_path}/clusters", f"images={photos}", f"output={tmp_path}/out.csv", "accelerator=cpu"],
    ):
        monkeypatch.setattr(sys, "argv", ["deepclust", *arguments])
        assert main() == 0, capfd.readouterr().err
    assert not connections
    assert (tmp_path / "clusters/report.html").is_file() and os.environ["HF_TOKEN"] == "geheim"
    assert "geheim" not in "".join(capfd.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 60 and not [path for path in files if b"geheim" in path.read_bytes()]
