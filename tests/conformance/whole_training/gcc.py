"""GCC before and with its graph: their model, losses, banks of features, graph and epoch of training."""

import os
import types
from pathlib import Path

import numpy as np
import torch
import yaml

from deepclust.config.build import build
from tests.conformance.whole_training.authors import authors_code, record_meter
from tests.conformance.whole_training.given import (
    GivenDraws,
    build_method,
    fit,
    make_images,
    read_weights,
    set_weights,
)

SMALL = [
    "backbone=conv_small",
    "backbone.widths=[8,16]",
    "backbone.pool_after=[1,2]",
    "backbone.grid=1",
    "method.embedding_size=12",
]
CASES = {
    "cifar10": {
        **{"M": 90, "K": 5, "size": 16, "B": 16, "drop_last": False, "view_noise": 1.0, "epochs": 5},
        "overrides": [
            "experiment=gcc_cifar10",
            *SMALL,
            "method.warmup_epochs=2",
            "method.graph_every_n_epochs=2",
            "method.optimizer.lr=0.04",
        ],
        "lr": 0.04,
    }
}
NAMES = {"backbone.": "backbone.", "contrastive_head.": "contrastive_head.", "cluster_head.0.": "cluster_head."}


def read_parameters(module, names=None) -> dict:
    """Return the weights without running statistics, which see batches in another order than theirs."""
    return {n: v for n, v in read_weights(module, names, skip=("bank.", "weights")).items() if ".running_" not in n}


def train_ours(case: dict) -> dict:
    method, cfg = build_method(case)
    set_weights(method)
    result = fit(method, cfg, case)
    graph = {"neighbors": method.neighbors.clone(), "weight.neighbors": method.weights.clone()}
    return result | read_parameters(method) | graph


class InnerProductIndex:
    """Stands in for faiss's exact index, in float64."""

    def __init__(self, num_features: int) -> None: ...

    def add(self, features: np.ndarray) -> None:
        self.features = features

    def search(self, features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        products = features @ self.features.T
        indices = np.argsort(-products, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(products, indices, 1), indices


FAISS = types.SimpleNamespace(IndexFlatIP=InnerProductIndex, index_cpu_to_all_gpus=lambda index: index)


class TrainLoader:
    """The batches of an epoch, with views of neighbours where there is a graph."""

    def __init__(self, images, epoch: int, neighbors, weights) -> None:
        self.images, self.epoch, self.neighbors, self.weights = images, epoch, neighbors, weights

    def __len__(self) -> int:
        return len(self.images.batches(self.epoch))

    def __iter__(self):
        for number, indices in enumerate(self.images.batches(self.epoch)):

            def view(rows, kind, number=number):
                return self.images.view(rows, kind, self.epoch, number)

            batch = {
                "image": view(indices, "view 0"),
                "augmented": view(indices, "view 1"),
                "neighbor": view(indices, "view 0"),
                "target": self.images.kinds[indices],
                "meta": {"index": indices},
            }
            if self.neighbors is not None:
                lists = torch.from_numpy(self.neighbors)[indices]
                generator = GivenDraws((0, self.epoch, number), 0, len(indices)).make_generator("companions")
                drawn = torch.randint(lists.shape[1], (len(lists), 1), generator=generator)
                batch["neighbor"] = view(lists.gather(1, drawn)[:, 0], "companion 3")
                for top in range(3):
                    batch[f"neighbor_top{top + 1}"] = view(lists[:, top], f"companion {top}")
                    weights = [float(self.weights[int(i)]) for i in lists[:, top]]
                    batch[f"neighbor_top{top + 1}_weight"] = torch.tensor(weights)
            yield batch


def train_authors(case: dict, code: Path) -> dict:
    images = make_images(case)
    _, cfg = build_method(case)
    backbone = build(cfg.backbone).double()
    method, neighbors, weights = cfg.method, None, None
    with authors_code(code, absent=("termcolor", "easydict"), given={"faiss": FAISS}):
        from losses.losses import AGCLoss, RGCLoss
        from models.models import End2EndModel
        from utils import aug_feat, common_config, memory, train_utils
        from utils import utils as their_utils

        config = yaml.safe_load((code / "configs/end2end/end2end_cifar10.yml").read_text())
        config |= {"epochs": case["epochs"], "optimizer_kwargs": config["optimizer_kwargs"] | {"lr": case["lr"]}}
        model = End2EndModel(
            {"backbone": backbone, "dim": backbone.num_features},
            features_dim=method.embedding_size,
            nheads=1,
            nclusters=case["K"],
        )
        set_weights(model, NAMES)
        contrast = RGCLoss(config["criterion_kwargs"]["temperature"])
        assignment = AGCLoss(config["criterion_kwargs"]["entropy_weight"])
        optimizer = common_config.get_optimizer(config, model)
        features = aug_feat.AugFeat("", 4)
        bank = memory.MemoryBank(case["M"], method.embedding_size, case["K"], 0.1)
        losses = record_meter(train_utils, "Loss")
        for epoch in range(case["epochs"]):
            common_config.adjust_learning_rate(config, optimizer, epoch)
            loader = TrainLoader(images, epoch, neighbors, weights)
            is_pretext = epoch < method.warmup_epochs
            train_utils.gcc_train(
                loader, model, contrast, assignment, optimizer, epoch, features, None, os.devnull, is_pretext
            )
            # Their numbers are 50 and 5.
            if (epochs_since := epoch - (method.warmup_epochs - 1)) >= 0 and epochs_since % 2 == 0:
                everything = {"target": images.kinds, "meta": {"index": torch.arange(len(images))}}
                their_utils.fill_memory_bank_mean([everything], features, None, bank)
                if epoch < case["epochs"] - 1:
                    neighbors, _, _ = bank.mine_nearest_neighbors(method.num_neighbors)
                    weights = bank.laplace_transform(neighbors)
        graph = {
            "neighbors": torch.from_numpy(neighbors),
            "weight.neighbors": torch.tensor([float(weights[i]) for i in range(len(images))]),
        }
        return {"loss": torch.tensor(losses)} | read_parameters(model, NAMES) | graph
