"""SCAN's pretext stage and clustering stage: their models, losses, mined neighbours, selection loss and epochs."""

import types
from pathlib import Path

import torch
import yaml

from deepclust.config.build import build
from tests.conformance.whole_training.authors import authors_code, record_meter
from tests.conformance.whole_training.gcc import FAISS
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
]
SIZES = {"M": 96, "K": 5, "size": 16, "B": 16, "drop_last": True, "view_noise": 1.0, "epochs": 2}
CASES = {
    "pretext": {
        **SIZES,
        "stage": "pretext",
        "overrides": ["method=scan_pretext", "dataset=cifar10", *SMALL, "method.embedding_size=12"],
        "config": "pretext/simclr_cifar10.yml",
    },
    "clustering": {
        **SIZES,
        "stage": "clustering",
        "epochs": 3,
        "overrides": ["experiment=scan_cifar10", *SMALL, "method.embedding_size=12", "method.optimizer.lr=0.01"],
        "config": "scan/scan_cifar10.yml",
        "optimizer": {"lr": 0.01},
    },
    # The backbone is not trained, and the best of several heads is selected.
    "heads": {
        **SIZES,
        "stage": "clustering",
        "epochs": 3,
        "overrides": [
            "experiment=scan_imagenet",
            *SMALL,
            "method.num_heads=3",
            "method.e_step_every_n_epochs=1",
            "method.num_neighbors=6",
            "method.optimizer.lr=0.5",
        ],
        "config": "scan/scan_imagenet_50.yml",
        "optimizer": {"lr": 0.5},
    },
}


class SelectionRecorder:
    """Notes the selection loss and the selected head whenever the method selects one."""

    def __init__(self, method) -> None:
        self.losses, self.heads = [], []
        e_step = method.e_step

        def record(features, key):
            e_step(features, key)
            self.losses.append(method.selection_loss.clone())
            self.heads.append(method.best_head.clone())

        method.e_step = record


def train_ours(case: dict) -> dict:
    method, cfg = build_method(case)
    set_weights(method)
    if case["stage"] == "pretext":
        return fit(method, cfg, case) | read_weights(method)
    method.has_earlier_run = True  # whose weights are those just set
    recorder = SelectionRecorder(method)
    result = fit(method, cfg, case, num_views=1) | {"neighbors": method.neighbors.clone()}
    result |= {"selection_loss": torch.stack(recorder.losses), "best_head": torch.stack(recorder.heads)}
    return result | read_weights(method, skip=("projector.",))


class TrainLoader:
    """The batches of an epoch under the names that their loops know."""

    def __init__(self, images, epoch: int, neighbors=None) -> None:
        self.images, self.epoch, self.neighbors = images, epoch, neighbors

    def __len__(self) -> int:
        return len(self.images.batches(self.epoch))

    def __iter__(self):
        for number, indices in enumerate(self.images.batches(self.epoch)):

            def view(rows, kind, number=number):
                return self.images.view(rows, kind, self.epoch, number)

            batch = {"target": self.images.kinds[indices]}
            if self.neighbors is None:
                yield batch | {"image": view(indices, "view 0"), "image_augmented": view(indices, "view 1")}
            else:
                generator = GivenDraws((0, self.epoch, number), 0, len(indices)).make_generator("companions")
                columns = torch.randint(self.neighbors.shape[1], (len(indices),), generator=generator)
                chosen = torch.from_numpy(self.neighbors)[indices, columns]
                yield batch | {"anchor": view(indices, "view 0"), "neighbor": view(chosen, "companion 0")}


def train_authors(case: dict, code: Path) -> dict:
    images = make_images(case)
    _, cfg = build_method(case)
    backbone = build(cfg.backbone).double()
    part = {"backbone": backbone, "dim": backbone.num_features}
    with authors_code(code, absent=("termcolor", "easydict"), given={"faiss": FAISS}):
        from losses import losses
        from models import models
        from utils import common_config, train_utils

        config = yaml.safe_load((code / "configs" / case["config"]).read_text())
        config |= {"epochs": case["epochs"]}
        config["optimizer_kwargs"] |= case.get("optimizer", {})
        if case["stage"] == "clustering":
            their = types.SimpleNamespace(losses=losses, models=models, config=common_config, loops=train_utils)
            return cluster(case, cfg, images, part, config, their)
        model = models.ContrastiveModel(part, features_dim=cfg.method.embedding_size)
        names = {"backbone.": "backbone.", "contrastive_head.": "projector."}
        set_weights(model, names)
        criterion = losses.SimCLRLoss(config["criterion_kwargs"]["temperature"])
        optimizer, values = common_config.get_optimizer(config, model), record_meter(train_utils, "Loss")
        for epoch in range(case["epochs"]):
            common_config.adjust_learning_rate(config, optimizer, epoch)
            train_utils.simclr_train(TrainLoader(images, epoch), model, criterion, optimizer, epoch)
        return {"loss": torch.tensor(values)} | read_weights(model, names)


def cluster(case: dict, cfg, images, part: dict, config: dict, their) -> dict:
    """Return what their clustering stage gives, which begins with the search of neighbours."""
    from utils import evaluate_utils, memory
    from utils import utils as their_utils

    num_heads, only_heads = cfg.method.num_heads, config["update_cluster_head_only"]
    names = {"backbone.": "backbone."} | {f"cluster_head.{h}.": f"heads.{h}." for h in range(num_heads)}
    model = their.models.ClusteringModel(part, case["K"], num_heads)
    set_weights(model, names)
    clean = [{"image": images.images, "target": images.kinds}]
    if cfg.method.mine_on == "projection":
        pretext = their.models.ContrastiveModel(part, features_dim=cfg.method.embedding_size)
        set_weights(pretext, {"contrastive_head.": "projector."})
        num_features = cfg.method.embedding_size
    else:
        pretext = torch.nn.Sequential(part["backbone"], UnitRows())
        num_features = part["dim"]
    bank = memory.MemoryBank(case["M"], num_features, case["K"], 0.1)
    their_utils.fill_memory_bank(clean, pretext, bank)
    neighbors, _ = bank.mine_nearest_neighbors(cfg.method.num_neighbors)

    selection_losses, best_heads = [], []

    def select() -> None:
        model.eval()
        with torch.no_grad():
            probabilities = [logits.softmax(1) for logits in model(images.images)]
        table = torch.from_numpy(neighbors)
        chosen = evaluate_utils.scan_evaluate([{"probabilities": p, "neighbors": table} for p in probabilities])
        selection_losses.append(chosen["lowest_loss"])
        best_heads.append(int(chosen["lowest_loss_head"]))

    config["num_heads"] = num_heads
    optimizer = their.config.get_optimizer(config, model, only_heads)
    criterion = their.losses.SCANLoss(**config["criterion_kwargs"])
    values = record_meter(their.loops, "Total Loss")
    for epoch in range(case["epochs"]):
        select()
        their.config.adjust_learning_rate(config, optimizer, epoch)
        loader = TrainLoader(images, epoch, neighbors)
        their.loops.scan_train(loader, model, criterion, optimizer, epoch, only_heads)
    result = {"loss": num_heads * torch.tensor(values), "neighbors": torch.from_numpy(neighbors)}
    result |= {"selection_loss": torch.tensor(selection_losses), "best_head": torch.tensor(best_heads)}
    return result | read_weights(model, names)


class UnitRows(torch.nn.Module):
    """Rows of length 1, as their features of ImageNet are mined."""

    def forward(self, rows):
        return torch.nn.functional.normalize(rows, dim=1)
