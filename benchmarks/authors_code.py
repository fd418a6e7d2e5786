"""The training step of the ProPos authors' own code, for `baseline.py --code DIR`.

DIR is a copy of github.com/Hzzone/ProPos. Their wrapper of networks and losses, their ResNet-18 for small images and
SGD as their configuration sets it up run in a process group of one process, as they start it. The batches come from
the loader of published_way.py, which makes the views that their loader makes. The rest of their trainer (logging, the
schedule of the learning rate, checkpoints) is left out; it would only add time.
"""

import importlib
import tempfile
from pathlib import Path

import torch
from measure import skip_package_init
from published_way import PublishedWayLoop
from torch import Tensor
from torch import distributed as dist
from training_loops import TrainingSetup


class AuthorsCodeLoop(PublishedWayLoop):
    """The authors' training step on the batches of `PublishedWayLoop`."""

    def __init__(self, setup: TrainingSetup, device: torch.device, batches: int, workers: int, code: Path) -> None:
        super().__init__(setup, device, batches, workers)
        skip_package_init(code, "models", "utils", "network")
        if device.type == "cpu":  # their code calls Tensor.cuda in any case
            torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
        if not dist.is_initialized():
            store = dist.FileStore(tempfile.mktemp(), 1)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
        wrapper_class = importlib.import_module("models.propos.byol_wrapper").BYOLWrapper
        network = importlib.import_module("network.resnet").ResNet("resnet18", cifar=True)()
        method = setup.method
        self.wrapper = wrapper_class(
            network,
            num_cluster=method.num_clusters,
            in_dim=512,
            temperature=method.temperature,
            byol_momentum=method.ema_decay,
            latent_std=method.noise_std,
        ).to(device)
        self.wrapper.psedo_labels = torch.arange(len(self.datamodule.fit), device=device) % method.num_clusters
        self.scattering_weight = method.scattering_weight
        self.sgd = torch.optim.SGD(
            [{"params": parameter} for parameter in self.wrapper.parameters()], lr=0.05, momentum=0.9, weight_decay=5e-4
        )

    def train_on_views(self, a: Tensor, b: Tensor, indices: Tensor) -> None:
        alignment, scattering, _ = self.wrapper(a, b, indices)
        self.sgd.zero_grad()
        (alignment + self.scattering_weight * scattering).backward()
        self.sgd.step()
