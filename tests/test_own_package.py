"""A method, a data set and views in a package of the user work without a fork of ours."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

METHOD = '''
"""A contrastive method: a linear head tells the views of an image from those of other images."""

import torch
from torch import nn

from deepclust.methods.base import ClusteringMethod


class Mine(ClusteringMethod):
    def __init__(self, *, temperature, **shared):
        super().__init__(**shared)
        self.head = nn.Linear(self.backbone.num_features, 8)
        self.temperature = temperature

    def losses(self, batch):
        a, b = (nn.functional.normalize(self.head(self.backbone(view)), dim=1) for view in batch.views)
        return {"contrast": nn.functional.cross_entropy(a @ b.T / self.temperature, torch.arange(len(a)))}
'''
DATASET = '''
"""Images of squares and of stripes, in noise."""

import numpy as np

from deepclust.datasets.image_sources import ArraySource, ImageSet


def load(*, size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 60, (size, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(size) % 2
    images[labels == 0, 2:6, 2:6] = 255
    images[labels == 1, ::2] = 255
    source = ArraySource([images])
    return ImageSet(source, source, labels=labels)
'''
VIEWS = '''
"""A transform that adds noise."""

import torch


class Noise:
    def __init__(self, *, std):
        self.std = std

    def draw(self, n, generator):
        return {"noise": torch.randn(n, 1, 8, 8, generator=generator) * self.std}

    def apply(self, images, draw):
        return (images + draw["noise"].to(images.device)).clamp(0, 1)
'''
FILES = {
    "mypkg/__init__.py": "",
    "mypkg/mine.py": METHOD,
    "mypkg/shapes.py": DATASET,
    "mypkg/noise.py": VIEWS,
    "my_conf/method/mine.yaml": """
# @package _global_
batch_size: 32
trainer: {max_epochs: 3}
method:
  _target_: mypkg.mine.Mine
  backbone: ${backbone}
  num_clusters: ${dataset.num_clusters}
  temperature: 0.5
  e_step_every_n_epochs: 0
  optimizer: {_target_: torch.optim.Adam, _partial_: true, lr: 1.0e-3}
  schedule: {_target_: deepclust.nn.schedules.Constant}
""",
    "my_conf/dataset/shapes.yaml": """
name: shapes
num_classes: 2
num_clusters: 2
num_images: null
image_size: 8
channels: 1
mean: [0.5]
std: [0.25]
source: {_target_: mypkg.shapes.load, size: 128}
""",
    "my_conf/views/noise.yaml": """
clean: []
weak:
  - {_target_: mypkg.noise.Noise, std: 0.1}
""",
}


@pytest.mark.slow  # tests/test_docs.py trains the smallest own method in every run
def test_package_of_the_user_trains(tmp_path: Path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip("\n"))
    program = [sys.executable, "-c", "from deepclust.cli.main import main; raise SystemExit(main())"]
    command = [*program, "train"]
    overrides = ["method=mine", "dataset=shapes", "views=noise", "backbone=conv_small", "hardware=cpu"]
    done = subprocess.run(
        [*command, "--config-dir", "my_conf", *overrides, "hydra.run.dir=run"],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["method"] == "mine" and results["dataset"] == "shapes"
    assert results["scores"]["method"] is None, "the method has no rule of its own"
    assert results["scores"]["kmeans"]["acc"] > 0.95
    assert len((tmp_path / "run/assignments.csv").read_text().splitlines()) == 129
    for trust, code in (("trust=mypkg", 0), ("trust=other", 2)):
        done = subprocess.run(
            [*program, "evaluate", "run=run", trust],
            cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
    assert "mypkg" in done.stderr and "add trust=mypkg" in done.stderr and done.stderr.count("\n") == 1
