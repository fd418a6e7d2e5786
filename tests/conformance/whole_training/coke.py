"""CoKe with one view, with two, and with two large views and small crops: their models, loops and optimiser."""

import importlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from deepclust.config.build import build
from tests.conformance.whole_training.authors import Backbone, authors_code, record_meter
from tests.conformance.whole_training.given import (
    build_method,
    fit,
    hashed,
    make_images,
    read_weights,
    set_weights,
)
from tests.conformance.whole_training.secu import SIZES, TrainLoader, wrap

SMALL = [
    "backbone=conv_small",
    "backbone.widths=[8,16]",
    "backbone.pool_after=[1,2]",
    "backbone.grid=1",
    "method.head_multiples=[1,2]",
    "method.embedding_size=12",
    "method.hidden_size=16",
]
CASES = {
    "single": {
        **SIZES,
        "epochs": 5,
        "num_views": 1,
        # The last two epochs average pseudo-labels and centroids.
        "overrides": ["experiment=coke_imagenet_single", *SMALL, "method.averaging_epochs=2", "method.num_slots=2"],
        "program": "single_view",
        "theirs": ["--coke-t", "0.1", "--coke-stage", "3", "--coke-tt", "0.5", "--coke-ls", "2", "--coke-beta", "1"],
    },
    "double": {
        **SIZES,
        "num_views": 2,
        "overrides": ["experiment=coke_imagenet", *SMALL],
        "program": "double_view",
        "theirs": ["--coke-t", "0.05", "--coke-alpha", "0.2"],
    },
    "multi": {
        **SIZES,
        "num_views": 4,
        "overrides": ["experiment=coke_imagenet_multi", *SMALL, "view_names=[first,second,small,small]"],
        "program": "multi_view",
        "theirs": ["--coke-t", "0.05", "--coke-alpha", "0.2", "--coke-beta", "0.5", "--coke-snum", "2"],
    },
}
NAMES = {"encoder.layers.": "backbone.", "encoder.fc.": "projector.", "predictor.": "predictor."}


def make_centroids(number: int, num_features: int, num_clusters: int) -> torch.Tensor:
    return F.normalize(hashed(f"centroids {number}", num_features, num_clusters), dim=0)


def train_ours(case: dict) -> dict:
    method, cfg = build_method(case)
    set_weights(method)
    for number, head in enumerate(method.heads):
        for centroids in (head.frozen, head.running):
            centroids.copy_(make_centroids(number, *centroids.shape))
    result = fit(method, cfg, case, num_views=case["num_views"])
    result |= read_weights(method, skip=("heads.", "memory."))
    for number, head in enumerate(method.heads):
        result |= {f"weight.frozen.{number}": head.frozen.clone(), f"weight.duals.{number}": head.balance.duals.clone()}
    return result | read_label_memory(method.memory.labels, method.memory.weights, method.heads[-1].balance.counts)


def read_label_memory(labels: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> dict:
    """Return the pseudo-labels (H, M) of all images, and the weight of each of the K labels where epochs are averaged.

    Slots are not compared one by one: theirs begin with label 1 and weight 0, which a label 1 may join.
    """
    tables = weights.new_zeros(*labels.shape[:2], len(counts)).scatter_add(2, labels.clamp(min=0), weights)
    return {
        "pseudo_labels": torch.where(weights.sum(2) > 0, tables.argmax(2), labels[:, :, 0]),
        "label_weights": tables,
    }


class MultiCropLoader(TrainLoader):
    """Views as their loader of small crops gives them: two, and a list of the others."""

    def __iter__(self):
        for views, indices in super().__iter__():
            yield [views[0], views[1], views[2:]], indices


class SingleViewLoader(TrainLoader):
    """One view, without a list around it."""

    def __iter__(self):
        for views, indices in super().__iter__():
            yield views[0], indices


def train_authors(case: dict, code: Path) -> dict:
    images = make_images(case)
    _, cfg = build_method(case)
    layers = build(cfg.backbone).double()
    heads = [case["K"] * multiple for multiple in cfg.method.head_multiples]
    with authors_code(code):
        main = importlib.import_module(f"main_{case['program']}")
        builder = importlib.import_module(f"coke.builder_{case['program']}")
        optimizer_module = importlib.import_module("coke.optimizer")
        options = main.parser.parse_args(
            [
                "none",
                *("--lr", "1.6", "--epochs", str(case["epochs"]), "--batch-size", str(case["B"])),
                *("--coke-num-ins", str(case["M"]), "--coke-num-head", str(len(heads))),
                *("--coke-k", *map(str, heads), "--coke-dim", str(cfg.method.embedding_size)),
                *("--coke-dual-lr", "20", "--coke-ratio", "0.4", *case["theirs"]),  # as in their scripts
            ]
        )
        is_single = case["program"] == "single_view"
        averaging = {"stage": options.coke_stage, "t": options.coke_tt, "ls": options.coke_ls} if is_single else {}
        model = builder.CoKe(
            base_encoder=lambda num_classes: Backbone(layers, num_classes, layers.num_features),
            K=options.coke_k,
            dim=options.coke_dim,
            num_ins=options.coke_num_ins,
            num_head=options.coke_num_head,
            T=options.coke_t,
            dual_lr=options.coke_dual_lr,
            ratio=options.coke_ratio,
            **averaging,
        )
        set_weights(model, NAMES)
        for number in range(len(heads)):
            for kind in ("pre", "cur"):
                centroids = getattr(model, f"{kind}_center_{number}")
                centroids.copy_(make_centroids(number, *centroids.shape))
        model.load_param()
        optimizer = optimizer_module.LARS(
            model.parameters(), options.lr, weight_decay=options.weight_decay, momentum=options.momentum
        )
        losses, loader = record_meter(main, "Loss"), {1: SingleViewLoader, 2: TrainLoader, 4: MultiCropLoader}
        for epoch in range(options.epochs):
            batches = loader[case["num_views"]](images, epoch, case["num_views"])
            main.train(batches, wrap(model), nn.CrossEntropyLoss(), optimizer, epoch, options, main.GradScaler())
            model.update_center(*[epoch] * is_single)
        result = {"loss": torch.tensor(losses)} | read_weights(model, NAMES)
        for number in range(len(heads)):
            result[f"weight.frozen.{number}"] = model.pre_centers[number].clone()
            result[f"weight.duals.{number}"] = model.duals[number].clone()
        labels = model.assign_labels if is_single else model.assign_labels.unsqueeze(2)
        weights = model.label_val if is_single else torch.zeros(labels.shape)
        return result | read_label_memory(labels, weights, model.counters[-1])
