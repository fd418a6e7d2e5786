"""DigPro: their networks, groups, bank and loop; groups and bank come from lightly, whose bank fits up to 1.4.24.

Needs lightly on the path, of which three files are imported: pip install --no-deps --target DIR lightly==1.4.18
"""

import importlib.util
import tempfile
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from deepclust.config.build import build
from tests.conformance.whole_training.authors import Registry, authors_code, empty_package
from tests.conformance.whole_training.given import build_method, fit, hashed, make_images, read_weights, set_weights
from tests.conformance.whole_training.propos import (
    SIZES,
    SMALL_HEADS,
    SMALL_NETWORK,
    KMeans,
    list_names,
    make_task,
    read_labels,
    set_their_weights,
)

CASES = {
    "imagenet10": {
        **SIZES,
        "overrides": [
            "experiment=digpro_imagenet10",
            *SMALL_NETWORK,
            *SMALL_HEADS,
            "method.embedding_size=256",  # in their code it is always this
            "method.warmup_epochs=1",
            "method.optimizer.lr=0.003125",
        ],
        "config": "ImageNet-10_r18_propos.yml",
        "theirs": {"warmup_epochs": 1},
    }
}


def make_groups(num_clusters: int, num_features: int) -> torch.Tensor:
    return hashed("groups", num_clusters, num_features) + 0.5


def make_bank(num_features: int) -> torch.Tensor:
    return F.normalize(hashed("bank", 2560, num_features), dim=1)


def train_ours(case: dict) -> dict:
    method, cfg = build_method(case)
    set_weights(method, skip=("target.",))
    method.target.update(method.backbone, method.projector, decay=0.0)
    method.groups.vectors.copy_(make_groups(*method.groups.vectors.shape))
    method.bank.rows.copy_(make_bank(method.bank.rows.shape[1]))
    result = fit(method, cfg, case)
    return result | read_weights(method, skip=("pseudo_labels.",)) | read_labels(method)


class GroupKMeans:
    """Stands in for scikit-learn's k-means of the groups: that of this package with the key of the step."""

    task = None

    def __init__(self, num_clusters: int) -> None:
        self.num_clusters = num_clusters

    def fit(self, features) -> "GroupKMeans":
        result = kmeans_on_all_ranks(
            torch.from_numpy(features),
            num_clusters=self.num_clusters,
            metric="euclidean",
            num_restarts=1,
            max_iterations=300,
            tolerance=1e-4,
            key=(0, *GroupKMeans.task.place, "groups"),
        )
        self.cluster_centers_ = result.centroids.numpy()
        return self


def train_authors(case: dict, code: Path) -> dict:
    images = make_images(case)
    _, cfg = build_method(case)
    backbone = build(cfg.backbone).double()
    lightly = importlib.util.find_spec("lightly")
    assert lightly is not None, "lightly is not on the path; see the module's docstring"
    folder = Path(lightly.submodule_search_locations[0])
    packages = ("lightly", "lightly.loss", "lightly.models", "lightly.models.modules", "lightly.utils")
    given = {name: empty_package(name, folder.parent / name.replace(".", "/")) for name in packages}
    given["lightly"]._torchvision_vit_available = False
    given |= {
        "models": empty_package("models", code / "models", model_dict=Registry()),
        "torch_clustering": types.SimpleNamespace(PyTorchKMeans=KMeans, evaluate_clustering=lambda *a, **o: {}),
        "network": types.SimpleNamespace(backbone_dict={"small": [lambda: backbone, backbone.num_features]}),
    }
    absent = ("munkres", "wandb", "matplotlib", "matplotlib.pyplot", "faiss")
    # NumPy 2 has no float_.
    with authors_code(code, absent, given), mock.patch.object(np, "float_", np.float64, create=True):
        import models.basic_template
        import models.propos.byol
        import models.propos.byol_wrapper

        models.propos.byol_wrapper.KMeans = GroupKMeans
        with tempfile.TemporaryDirectory() as logs:
            task = make_task(models, images, case, code)
            task.logger.log_save_dir = logs
            names = list_names(is_resnet=False)
            set_their_weights(task, names)
            wrapper, GroupKMeans.task = task.byol.module, task
            bank, smog = wrapper.memory_bank, wrapper.smog
            smog.group_features.data = make_groups(*smog.group_features.shape)
            bank.bank = make_bank(cfg.method.embedding_size).T.contiguous()
            bank.bank_ptr = torch.zeros(1, dtype=torch.int64)
            with mock.patch.object(torch, "randn_like", task.hashed_noise):
                task.fit()
        result = {"loss": torch.tensor(task.losses), "pseudo_labels": task.labels_in_use}
        result |= {"weight.groups.vectors": smog.group_features.detach(), "weight.bank.rows": bank.bank.T.contiguous()}
        return result | read_weights(wrapper, names)
