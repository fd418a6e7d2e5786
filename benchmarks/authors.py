"""The step of the ProPos authors' own code, for `baseline.py --code DIR`; DIR is a copy of github.com/Hzzone/ProPos.

Their wrapper of networks and losses, their ResNet-18 for small images, SGD as their configuration sets it up, in a
process group of one as they start it. The images come from `published.py`'s loader, which makes the views that theirs
makes. What of their trainer is left out (logging, the learning rate's schedule, checkpoints) would only add time.
"""

import importlib
import tempfile
from pathlib import Path

import torch
from measure import bare_packages
from published import Published
from step import Work
from torch import Tensor
from torch import distributed as dist


class Authors(Published):
    """Their step on the batches of the published way."""

    def __init__(self, work: Work, device: torch.device, batches: int, workers: int, code: Path) -> None:
        super().__init__(work, device, batches, workers)
        bare_packages(code, "models", "utils", "network")
        if device.type == "cpu":  # they ask for a GPU by name
            torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign, assignment]
        if not dist.is_initialized():
            store = dist.FileStore(tempfile.mktemp(), 1)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=0, world_size=1)
        wrapper = importlib.import_module("models.propos.byol_wrapper").BYOLWrapper
        network = importlib.import_module("network.resnet").ResNet("resnet18", cifar=True)()
        method = work.method
        self.theirs = wrapper(
            network,
            num_cluster=method.num_clusters,
            in_dim=512,
            temperature=method.temperature,
            byol_momentum=method.ema_decay,
            latent_std=method.noise_std,
        ).to(device)
        self.theirs.psedo_labels = torch.arange(len(self.datamodule.fit), device=device) % method.num_clusters
        self.weight = method.scattering_weight
        self.sgd = torch.optim.SGD(
            [{"params": parameter} for parameter in self.theirs.parameters()], lr=0.05, momentum=0.9, weight_decay=5e-4
        )

    def step_on(self, a: Tensor, b: Tensor, indices: Tensor) -> None:
        align, scatter, _ = self.theirs(a, b, indices)
        self.sgd.zero_grad()
        (align + self.weight * scatter).backward()
        self.sgd.step()
