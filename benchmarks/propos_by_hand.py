"""ProPos in plain PyTorch, as one writes it without a framework: the same mathematics and nothing else.

`step.py` compares our training with it. `published_way.py` trains it on batches that are made as in published code.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.methods.propos import ProPos


class ProPosByHand:
    """The networks, the optimizer and the training step of ProPos.

    Initial weights and hyper-parameters are those of `method`, which must not have been trained yet. Configurations
    with a queue, or without weight decay on biases and norms, are not covered.
    """

    def __init__(self, method: ProPos, *, steps_per_epoch: int) -> None:
        assert method.queue is None and method.decay_biases_and_norms and method.schedule.variant == "fractional"
        self.method = method
        self.online: nn.Module = nn.Sequential(copy.deepcopy(method.backbone), copy.deepcopy(method.projector))
        self.predictor = copy.deepcopy(method.predictor)
        self.target: nn.Module = copy.deepcopy(self.online).requires_grad_(False)
        self.optimizer = method.make_optimizer(
            [{"params": list(self.online.parameters())}, {"params": list(self.predictor.parameters())}]
        )
        self.base_rates = [self.optimizer.param_groups[0]["lr"] * factor for factor in (1, method.predictor_lr_factor)]
        self.steps_per_epoch = steps_per_epoch
        self.num_steps = 0

    def step(
        self,
        a: Tensor,
        b: Tensor,
        pseudo_labels: Tensor,
        noise: tuple[Tensor, Tensor] | None,
        *,
        use_scattering: bool,
    ) -> None:
        """Take one optimizer step on two views (N, C, H, W) with pseudo-labels (N,).

        `noise` is that of positive sampling, (N, D) for each view.
        """
        self.num_steps += 1
        method = self.method
        epoch, schedule = self.num_steps / self.steps_per_epoch, method.schedule
        factor = epoch / schedule.warmup_epochs
        if epoch >= schedule.warmup_epochs:
            factor = (1 + math.cos(math.pi * (epoch - schedule.warmup_epochs) / schedule.epochs)) / 2
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor

        if method.step_order == "joint":
            self.update_target()
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
        if use_scattering:
            scattering = (self.scattering(q_a, k_b, pseudo_labels) + self.scattering(q_b, k_a, pseudo_labels)) / 2
            loss = loss + method.scattering_weight * scattering
        if method.step_order == "two_pass":
            self.update_target()
        self.optimizer.zero_grad()
        with torch.autocast(a.device.type, enabled=False):
            loss.backward()
        self.optimizer.step()

    def scattering(self, q: Tensor, k: Tensor, pseudo_labels: Tensor) -> Tensor:
        """Return the prototype scattering loss of online and target embeddings (N, D)."""
        q, k = (x.float() if x.dtype == torch.bfloat16 else x for x in (q, k))
        members = F.one_hot(pseudo_labels, self.method.num_clusters).to(q.dtype)
        present = members.sum(0) > 0
        online, target = (
            F.normalize(members.T @ F.normalize(x, dim=1) / members.sum(0).clamp(min=1)[:, None], dim=1) for x in (q, k)
        )
        positive = (online * target).sum(1) / self.method.temperature
        logits = online @ online.T / self.method.temperature
        logits = torch.where(torch.eye(len(online), dtype=torch.bool, device=q.device), positive, logits)
        logits = logits.masked_fill(~present, -10)
        return torch.where(present, logits.logsumexp(1) - positive, 0).sum() / present.sum()

    @torch.no_grad()
    def update_target(self) -> None:
        """Move the weights of the target network towards those of the online network."""
        method = self.method
        progress = (math.cos(math.pi * self.num_steps / (method.epochs * self.steps_per_epoch)) + 1) / 2
        decay = method.ema_decay_end - (method.ema_decay_end - method.ema_decay) * progress
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.mul_(decay).add_(online, alpha=1 - decay)

    @torch.no_grad()
    def features(self, batches: list[Tensor]) -> Tensor:
        """Return the features (M, D) that k-means clusters, of clean images in batches."""
        self.target.eval()
        features = torch.cat([F.normalize(self.target(images), dim=1) for images in batches])
        self.target.train()
        return features
