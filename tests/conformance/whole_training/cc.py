"""CC: their network, losses and epoch of training."""

from pathlib import Path

import torch
import yaml

from deepclust.config.build import build
from tests.conformance.whole_training.authors import authors_code
from tests.conformance.whole_training.given import build_method, fit, make_images, read_weights, set_weights

SMALL = [
    "backbone=conv_small",
    "backbone.widths=[8,16]",
    "backbone.pool_after=[1,2]",
    "backbone.grid=1",
    "method.embedding_size=12",
]
CASES = {
    "cifar10": {
        **{"M": 96, "K": 5, "size": 16, "B": 16, "drop_last": True, "view_noise": 1.0, "epochs": 2},
        "overrides": ["experiment=cc_cifar10", *SMALL],
    }
}
NAMES = {"resnet.": "backbone.", "instance_projector.": "instance_head.", "cluster_projector.": "cluster_head."}


def train_ours(case: dict) -> dict:
    method, cfg = build_method(case)
    set_weights(method)
    return fit(method, cfg, case) | read_weights(method)


class TrainLoader:
    """Both views of the batches of an epoch, with the labels that their loop leaves unused."""

    def __init__(self, images, epoch: int) -> None:
        self.images, self.epoch = images, epoch

    def __len__(self) -> int:
        return len(self.images.batches(self.epoch))

    def __iter__(self):
        for number, indices in enumerate(self.images.batches(self.epoch)):
            views = tuple(self.images.view(indices, f"view {v}", self.epoch, number) for v in range(2))
            yield views, self.images.kinds[indices]


def train_authors(case: dict, code: Path) -> dict:
    images = make_images(case)
    _, cfg = build_method(case)
    backbone = build(cfg.backbone).double()
    backbone.rep_dim = backbone.num_features
    with authors_code(code, absent=("cv2",)):
        import train
        from modules import contrastive_loss, network

        options = yaml.safe_load((code / "config/config.yaml").read_text())
        model = network.Network(backbone, cfg.method.embedding_size, case["K"])
        set_weights(model, NAMES)
        train.model = model
        train.optimizer = torch.optim.Adam(
            model.parameters(), lr=float(options["learning_rate"]), weight_decay=float(options["weight_decay"])
        )
        instance = contrastive_loss.InstanceLoss(case["B"], options["instance_temperature"], "cpu")
        cluster = contrastive_loss.ClusterLoss(case["K"], options["cluster_temperature"], "cpu")
        losses: list[float] = []

        def record_instance(z_i, z_j):
            losses.append(0.0)
            return add(instance(z_i, z_j))

        def add(loss):
            losses[-1] += float(loss)
            return loss

        train.criterion_instance = record_instance
        train.criterion_cluster = lambda c_i, c_j: add(cluster(c_i, c_j))
        for epoch in range(case["epochs"]):
            train.data_loader = TrainLoader(images, epoch)
            train.train()
        return {"loss": torch.tensor(losses)} | read_weights(model, NAMES)
