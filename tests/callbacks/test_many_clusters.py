"""An evaluation with as many as 10,000 clusters holds no table of all images and clusters."""

import subprocess
import sys
from pathlib import Path

import pytest

NUM_IMAGES, NUM_CLUSTERS = 50_000, 10_000
PROGRAM = f"""
import types
from pathlib import Path
import numpy as np, torch
from deepclust.callbacks.evaluation import Evaluator
from deepclust.clustering.backend import clustering_settings
from deepclust.clustering.kmeans_distances import centroid_logits

def read_peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM"))

features = torch.randn({NUM_IMAGES}, 4, generator=torch.Generator().manual_seed(0))
centroids = features[torch.randperm({NUM_IMAGES})[:{NUM_CLUSTERS}]]
method = types.SimpleNamespace(
    num_clusters={NUM_CLUSTERS},
    device=torch.device("cpu"),
    encode_all=lambda batches, num_images: features,
    cluster_logits=lambda rows: centroid_logits(rows, centroids, metric="cosine"),
    cluster_tree=lambda: None,
    sample_images=lambda key: None,
)
datamodule = types.SimpleNamespace(clean_batches=lambda images, device: [], fit=None)
evaluator = Evaluator(
    images=range({NUM_IMAGES}),
    labels=np.arange({NUM_IMAGES}) % 10,
    num_classes=10,
    num_clusters={NUM_CLUSTERS},
    kmeans_restarts=1,
    kmeans_max_iterations=2,
    kmeans_tolerance=0.0,
    seed=0,
)
before = read_peak()
with clustering_settings(
    backend="torch", seeding_rows_per_cluster=1, neighbor_index="flat", neighbor_index_min_rows=1
):
    result = evaluator(method, datamodule)
assert result.assignments.shape == ({NUM_IMAGES},)
assert set(result.scores) == {{"method", "kmeans"}}
print(read_peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_ten_thousand_clusters_take_no_table_of_images_and_clusters():
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=3600)
    assert ended.returncode == 0, ended.stderr
    table = NUM_IMAGES * NUM_CLUSTERS * 4 / 2**30  # GiB of one in float32
    assert float(ended.stdout.split()[-1]) < 0.7 * table
