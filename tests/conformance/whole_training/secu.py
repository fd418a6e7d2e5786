"""SeCu with both constraints: their model, their training loop of an epoch and their learning rates."""

from pathlib import Path

import torch
from torch import nn

from deepclust.config.build import build
from tests.conformance.whole_training.authors import Backbone, authors_code, record_meter
from tests.conformance.whole_training.given import (
    build_method,
    fit,
    make_images,
    make_weight,
    read_weights,
    set_weights,
)

SMALL = [
    "backbone=conv_small",
    "backbone.widths=[8,16]",
    "backbone.pool_after=[1,2]",
    "backbone.grid=1",
    "method.head_multiples=[1,2]",
    "method.embedding_size=12",
    "method.hidden_size=16",
]
SIZES = {"M": 90, "K": 5, "size": 16, "B": 16, "drop_last": False, "view_noise": 1.0, "epochs": 3}
CASES = {
    "size": {**SIZES, "overrides": ["experiment=secu_cifar10", *SMALL], "theirs": ["--secu-cst", "size"]},
    "entropy": {
        **SIZES,
        "overrides": ["experiment=secu_cifar10_entropy", *SMALL],
        # 6000 for 50,000 images
        "theirs": ["--secu-cst", "entropy", "--secu-alpha", "10.8"],
    },
}
NAMES = {"encoder.layers.": "backbone.", "encoder.fc.": "projector."}


def train_ours(case: dict) -> dict:
    method, cfg = build_method(case)
    set_weights(method)
    result = fit(method, cfg, case)
    result |= read_weights(method, skip=("heads.",)) | {"pseudo_labels": method.pseudo_labels.clone()}
    for number, head in enumerate(method.heads):
        result[f"weight.prototypes.{number}"] = head.prototypes.detach().clone()
    return result


class TrainLoader:
    """Both views of the batches of an epoch."""

    def __init__(self, images, epoch: int, num_views: int = 2) -> None:
        self.images, self.epoch, self.num_views = images, epoch, num_views

    def __len__(self) -> int:
        return len(self.images.batches(self.epoch))

    def __iter__(self):
        for number, indices in enumerate(self.images.batches(self.epoch)):
            yield [self.images.view(indices, f"view {v}", self.epoch, number) for v in range(self.num_views)], indices


def train_authors(case: dict, code: Path) -> dict:
    images = make_images(case)
    _, cfg = build_method(case)
    layers = build(cfg.backbone).double()
    heads = [case["K"] * multiple for multiple in cfg.method.head_multiples]
    with authors_code(code):
        import main
        import secu.builder

        options = main.parser.parse_args(
            [
                "none",
                *("--epochs", str(case["epochs"]), "--batch-size", str(case["B"])),
                *("--secu-num-ins", str(case["M"]), "--secu-num-head", str(len(heads))),
                *("--secu-k", *map(str, heads), "--secu-dim", str(cfg.method.embedding_size)),
                *("--clr", "1.2", *case["theirs"]),  # as in run_cifar10.sh
            ]
        )
        model = secu.builder.SeCu(
            base_encoder=lambda num_classes: Backbone(layers, num_classes, layers.num_features),
            K=options.secu_k,
            tx=options.secu_tx,
            tw=options.secu_tw,
            dim=options.secu_dim,
            num_ins=options.secu_num_ins,
            alpha=options.secu_alpha,
            dual_lr=options.secu_dual_lr,
            lratio=options.secu_lratio,
            constraint=options.secu_cst,
        )
        set_weights(model, NAMES)
        centers = [getattr(model, f"center_{number}") for number in range(len(heads))]
        for number, center in enumerate(centers):
            center.data.copy_(make_weight(f"heads.{number}.prototypes", center.shape, is_norm=False))
        model.load_param()
        others = [p for name, p in model.named_parameters() if "center" not in name]
        optimizer = torch.optim.SGD(
            [{"params": others, "lr": options.lr}, {"params": centers, "lr": options.clr}],
            weight_decay=options.weight_decay,
            momentum=options.momentum,
        )
        losses = record_meter(main, "Loss")
        for epoch in range(options.epochs):
            loader = TrainLoader(images, epoch)
            main.train(loader, wrap(model), nn.CrossEntropyLoss(), optimizer, epoch, options, main.GradScaler())
            if options.secu_cst == "size":
                model.reset_count()
        result = {"loss": torch.tensor(losses), "pseudo_labels": torch.stack(model.assign_labels)}
        result |= read_weights(model, NAMES)
        for number, center in enumerate(centers):
            result[f"weight.prototypes.{number}"] = center.detach().clone()
        return result


def wrap(model: nn.Module) -> nn.Module:
    """Return the model as DistributedDataParallel holds it: its training loop asks for `module`."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, *args):
            return self.module(*args)

    return Wrapped()
