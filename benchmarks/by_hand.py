"""ProPos in plain PyTorch, as one writes it without a framework: the same mathematics, nothing beside it.

What `step.py` holds our training against, and what `published.py` feeds as the published codes of the field do.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.methods.propos import ProPos


class ProPosByHand:
    """Networks and optimiser, with the first weights and the numbers of a method that has not begun.

    Recipes with a queue, or without weight decay on some weights, are left out.
    """

    def __init__(self, method: ProPos, *, steps_per_epoch: int) -> None:
        assert method.queue is None and method.decay_biases_and_norms and method.schedule.variant == "fractional"
        self.like = method
        self.online: nn.Module = nn.Sequential(copy.deepcopy(method.backbone), copy.deepcopy(method.projector))
        self.predictor = copy.deepcopy(method.predictor)
        self.target: nn.Module = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = method.make_optimizer(
            [{"params": list(self.online.parameters())}, {"params": list(self.predictor.parameters())}]
        )
        self.rates = [self.optimizer.param_groups[0]["lr"] * factor for factor in (1, method.predictor_lr_factor)]
        self.steps_per_epoch = steps_per_epoch
        self.steps = 0

    def step(self, a: Tensor, b: Tensor, labels: Tensor, noise: tuple[Tensor, Tensor] | None, *, scatter: bool) -> None:
        """One optimiser step on two views (N, C, H, W) with pseudo-labels (N,); `noise`: of positive sampling."""
        self.steps += 1
        like = self.like
        epoch, schedule = self.steps / self.steps_per_epoch, like.schedule
        factor = epoch / schedule.warmup_epochs
        if epoch >= schedule.warmup_epochs:
            factor = (1 + math.cos(math.pi * (epoch - schedule.warmup_epochs) / schedule.epochs)) / 2
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

        if like.step_order == "joint":
            self.follow()
            q = self.online(torch.cat([a, b]))
            with torch.no_grad():
                k = F.normalize(self.target(torch.cat([b, a])), dim=1)
            p = self.predictor(q if noise is None else q + torch.cat(noise))
            q_a, q_b = q.chunk(2)
            k_b, k_a = k.chunk(2)
            loss = -2 * F.cosine_similarity(p, k, dim=1).mean()
        else:
            q_a, q_b = self.online(a), self.online(b)
            with torch.no_grad():
                k_b, k_a = (F.normalize(self.target(x), dim=1) for x in (b, a))
            loss = 0.0
            for q, k, i in ((q_a, k_b, 0), (q_b, k_a, 1)):
                p = self.predictor(q if noise is None else q + noise[i])
                loss = loss - F.cosine_similarity(p, k, dim=1).mean()
        if scatter:
            loss = (
                loss
                + like.scattering_weight * (self.scattering(q_a, k_b, labels) + self.scattering(q_b, k_a, labels)) / 2
            )
        if like.step_order == "two_pass":
            self.follow()
        self.optimizer.zero_grad()
        with torch.autocast(a.device.type, enabled=False):
            loss.backward()
        self.optimizer.step()

    def scattering(self, q: Tensor, k: Tensor, labels: Tensor) -> Tensor:
        q, k = (x.float() if x.dtype == torch.bfloat16 else x for x in (q, k))
        members = F.one_hot(labels, self.like.num_clusters).to(q.dtype)
        present = members.sum(0) > 0
        online, target = (
            F.normalize(members.T @ F.normalize(x, dim=1) / members.sum(0).clamp(min=1)[:, None], dim=1) for x in (q, k)
        )
        positive = (online * target).sum(1) / self.like.temperature
        logits = online @ online.T / self.like.temperature
        logits = torch.where(torch.eye(len(online), dtype=torch.bool, device=q.device), positive, logits)
        logits = logits.masked_fill(~present, -10)
        return torch.where(present, logits.logsumexp(1) - positive, 0).sum() / present.sum()

    @torch.no_grad()
    def follow(self) -> None:
        like = self.like
        progress = (math.cos(math.pi * self.steps / (like.epochs * self.steps_per_epoch)) + 1) / 2
        decay = like.ema_decay_end - (like.ema_decay_end - like.ema_decay) * progress
        for ours, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
            ours.mul_(decay).add_(theirs, alpha=1 - decay)

    @torch.no_grad()
    def features(self, batches: list[Tensor]) -> Tensor:
        """What k-means is run on, (M, D), of clean images in batches."""
        self.target.eval()
        rows = torch.cat([F.normalize(self.target(images), dim=1) for images in batches])
        self.target.train()
        return rows
