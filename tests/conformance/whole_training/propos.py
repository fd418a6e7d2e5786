"""ProPos, in both orders of a step, and with the optimiser of its ImageNet recipe."""

import types
from pathlib import Path
from unittest import mock

import torch
import yaml
from torch import nn

from deepclust.clustering.distributed_kmeans import kmeans_on_all_ranks
from tests.conformance.whole_training.authors import Registry, authors_code, empty_package
from tests.conformance.whole_training.given import (
    GivenImages,
    build_method,
    fit,
    hashed,
    make_images,
    read_weights,
    set_weights,
)

SMALL_NETWORK = ["backbone=conv_small", "backbone.widths=[8,16]", "backbone.pool_after=[1,2]"]
# One start of k-means: several can reach the same clusters under other numbers, and rounding would choose among them.
SMALL_HEADS = ["method.hidden_size=24", "method.embedding_size=12", "method.kmeans_restarts=1"]
SIZES = {"M": 96, "K": 5, "size": 16, "B": 16, "drop_last": True, "view_noise": 1.0, "epochs": 3}
IMAGENET = [
    *SMALL_HEADS,
    "method.warmup_epochs=2",
    "method.e_step_every_n_epochs=2",
    "method.queue_size=32",
    "method.scattering_weight=0.001",
    "method.optimizer.lr=0.01875",
    "trainer.accumulate_grad_batches=2",
]
IMAGENET_OF_THEIRS = {
    "warmup_epochs": 2,
    "reassign": 2,
    "queue_size": 32,
    "acc_grd_step": 2,
    "resume_epoch": 0,
    "syncbn": False,
    "byol_transform": False,
}
CASES = {
    "two_pass": {
        **SIZES,
        "overrides": [
            "experiment=propos_cifar10",
            *SMALL_NETWORK,
            *SMALL_HEADS,
            "method.warmup_epochs=1",
            "method.optimizer.lr=0.003125",
            "method.scattering_weight=0.1",
        ],
        "config": "cifar10_r18_propos.yml",
        "theirs": {"warmup_epochs": 1},
    },
    "joint": {
        **SIZES,
        "overrides": [
            "experiment=propos_cifar20",
            *SMALL_NETWORK,
            *SMALL_HEADS,
            "method.warmup_epochs=1",
            "method.optimizer.lr=0.003125",
            "method.scattering_weight=0.1",
        ],
        "config": "cifar20_r18_propos.yml",
        "theirs": {"warmup_epochs": 1},
    },
    # 7 batches an epoch, of which 2 are accumulated for a step, so that steps reach over the end of an epoch.
    "imagenet": {
        **SIZES,
        **{"M": 56, "B": 8, "epochs": 4},
        "backbone": "SmallResNet",
        "overrides": ["experiment=propos_imagenet", *IMAGENET],
        "config": "propos_imagenet_r50_8xbs32xaccum16_200e.yml",
        "theirs": IMAGENET_OF_THEIRS,
    },
    "imagenet_resnet18": {
        **SIZES,
        **{"M": 56, "B": 8, "epochs": 4, "size": 32},
        "overrides": ["experiment=propos_imagenet", "backbone=resnet18", *IMAGENET],
        "config": "propos_imagenet_r50_8xbs32xaccum16_200e.yml",
        "theirs": IMAGENET_OF_THEIRS | {"encoder_name": "resnet18"},
        "recorded": False,  # it takes too long for a test
    },
}

PARTS = {"_q.": "", "_k.": "target."}
RESNET = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def train_ours(case: dict) -> dict:
    method, cfg = build_method(case)
    set_weights(method, skip=("target.",))
    method.target.update(method.backbone, method.projector, decay=0.0)
    result = fit(method, cfg, case)
    return result | read_weights(method, skip=("pseudo_labels.", "queue.")) | read_labels(method)


def read_labels(method) -> dict:
    return {"pseudo_labels": method.pseudo_labels.assignments.clone()}


def list_names(*, is_resnet: bool) -> dict[str, str]:
    """Return the prefixes of weights in their networks and in ours. The parts of their ResNets have numbers."""
    names = {"predictor.": "predictor."}
    for suffix, target in PARTS.items():
        names[f"projector{suffix}"] = f"{target}projector."
        if is_resnet:
            names |= {f"encoder{suffix}{n}.": f"{target}backbone.network.{part}." for n, part in RESNET.items()}
        else:
            names[f"encoder{suffix}"] = f"{target}backbone."
    return names


class KMeans:
    """Stands in for theirs, which has other starts: the k-means of this package with the key of the epoch."""

    epoch = 0

    def __init__(self, *, n_clusters: int, **options: object) -> None:
        self.num_clusters = n_clusters

    def fit_predict(self, features: torch.Tensor) -> torch.Tensor:
        result = kmeans_on_all_ranks(
            features,
            num_clusters=self.num_clusters,
            metric="cosine",
            num_restarts=1,
            max_iterations=300,
            tolerance=1e-4,
            key=(0, "e_step", KMeans.epoch),
        )
        self.cluster_centers_ = result.centroids
        return result.assignments


class CleanLoader:
    """All images in order, as one batch."""

    def __init__(self, images: GivenImages) -> None:
        self.dataset, self.sampler = images, range(len(images))
        self.images = images

    def __iter__(self):
        yield [self.images.images, self.images.kinds]


class TrainLoader:
    """Both views of the batches of the task's epoch; notes the labels that a batch is trained with."""

    def __init__(self, task, images: GivenImages) -> None:
        self.task, self.images = task, images

    def __len__(self) -> int:
        return len(self.images.batches(0))

    def __iter__(self):
        epoch = self.task.cur_epoch - 1
        for number, indices in enumerate(self.images.batches(epoch)):
            self.task.place = epoch, number
            self.task.labels_in_use = self.task.psedo_labels.clone()
            views = [self.images.view(indices, f"view {v}", epoch, number) for v in range(2)]
            yield [[views, self.images.kinds[indices]], indices]


def train_authors(case: dict, code: Path) -> dict:
    images = make_images(case)
    method, _ = build_method(case)
    backbone, is_small_resnet = method.backbone, "backbone" in case
    layers = nn.Sequential(*backbone.network) if is_small_resnet else backbone
    given = {
        "models": empty_package("models", code / "models", model_dict=Registry()),
        "torch_clustering": types.SimpleNamespace(PyTorchKMeans=KMeans, evaluate_clustering=lambda *a, **o: {}),
    }
    if not (is_their_resnet := "encoder_name" in case["theirs"]):
        given["network"] = types.SimpleNamespace(backbone_dict={"small": [lambda: layers, backbone.num_features]})
    with authors_code(code, absent=("munkres", "wandb", "matplotlib", "matplotlib.pyplot", "faiss"), given=given):
        import models.basic_template
        import models.propos.byol

        task = make_task(models, images, case, code)
        names = list_names(is_resnet=is_small_resnet or is_their_resnet)
        set_their_weights(task, names)
        with mock.patch.object(torch, "randn_like", task.hashed_noise):
            task.fit()
        printed = 2.0 if task.opt.v2 else 0.0  # a constant that their joint step adds to the loss
        result = {"loss": torch.tensor(task.losses) - printed}
        result |= read_weights(task.byol.module, names) | {"pseudo_labels": task.labels_in_use}
        return result


def set_their_weights(task, names: dict[str, str]) -> None:
    """Give their networks the initial weights; their target networks become copies of the online ones."""
    wrapper = task.byol.module
    set_weights(wrapper, names, skip=tuple(theirs for theirs, ours in names.items() if ours.startswith("target.")))
    for online, target in zip(wrapper.q_params, wrapper.k_params, strict=True):
        target.data.copy_(online.data)


def make_task(models, images: GivenImages, case: dict, code: Path):
    """Return their task of a training, with their configuration and the given images."""
    template, byol = models.basic_template, models.propos.byol
    template.LoggerX = mock.MagicMock()
    template.tqdm = mock.MagicMock()

    class Network(nn.Module):  # as in DistributedDataParallel
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **options):
            return self.module(*args, **options)

    byol.convert_to_ddp = Network

    class Task(byol.BYOL):
        def set_loader(self):
            self.losses, self.place = [], (0, 0)
            self.train_loader, self.memory_loader = TrainLoader(self, images), CleanLoader(images)
            self.test_loader, self.sampler = self.memory_loader, mock.MagicMock()
            self.iter_per_epoch = len(self.train_loader)
            self.num_cluster = self.opt.num_cluster = case["K"]
            self.psedo_labels = torch.zeros(len(images), dtype=torch.int64)

        def psedo_labeling(self, n_iter):
            KMeans.epoch = 0 if n_iter == 1 else self.cur_epoch
            super().psedo_labeling(n_iter)

        def hashed_noise(self, q):
            epoch, batch = self.place
            names = [f"noise of {view} of batch {batch} of epoch {epoch}" for view in "ab"]
            if len(q) == 2 * images.batch_size:
                return torch.cat([hashed(name, len(q) // 2, q.shape[1]) for name in names])
            self.is_second = not getattr(self, "is_second", True)
            return hashed(names[self.is_second], *q.shape)

    options, unknown = template.TrainTask.build_default_options().parse_known_args("")
    options = byol.BYOL.build_options().parse_args(unknown, namespace=options)
    config = yaml.safe_load((code / "config" / case["config"]).read_text())
    small = {"encoder_name": "small", "hidden_size": 24, "feat_dim": 12, "batch_size": case["B"]}
    others = {"epochs": case["epochs"], "run_name": "", "whole_dataset": True, "num_cluster": case["K"]}
    for name, value in (config | small | others | case["theirs"]).items():
        setattr(options, name, value)
    task = Task(options)
    step = task.scaler

    def scaler(loss, **settings):
        task.losses.append(float(loss))
        return step(loss, **settings)

    task.scaler = scaler
    return task
