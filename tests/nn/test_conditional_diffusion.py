"""The diffusion model: noise, sampling of a network that knows the answer, conditions, padding, processes."""

import sys

import pytest
import torch

from deepclust.engine import distributed
from deepclust.errors import InputError
from deepclust.nn import conditional_diffusion
from deepclust.nn.conditional_diffusion import ConditionalDiffusion, add_noise, ddim_step, linear_alphas_cumprod

K = 3


def make_diffusion(**arguments):
    torch.manual_seed(0)
    numbers = {
        "num_clusters": K,
        "channels": 1,
        "image_size": 4,
        "widths": [8, 8],
        "layers_per_level": 1,
        "attention": False,
        "num_steps": 100,
        "beta_start": 1e-3,
        "beta_end": 0.1,
        "num_sampling_steps": 10,
        "guidance": 1.5,
    }
    diffusion = ConditionalDiffusion(**{**numbers, **arguments})
    torch.nn.init.normal_(diffusion.unet.class_embedding.weight, std=30.0)  # so that conditions show without training
    return diffusion


def test_an_image_loses_its_signal_and_keeps_its_variance():
    alphas = linear_alphas_cumprod(1000, beta_start=1e-4, beta_end=0.02)
    assert alphas[0] == 1 - 1e-4 and alphas[-1] < 1e-4 and (alphas.diff() < 0).all()
    torch.manual_seed(0)
    images, noise = torch.randn(2, 1000, 100, dtype=torch.float64)
    noised = add_noise(images, noise, alphas)
    assert noised.var(1).mean() == pytest.approx(1, abs=0.02)
    assert torch.corrcoef(torch.stack([noised[0], images[0]]))[0, 1] > 0.999
    assert torch.corrcoef(torch.stack([noised[-1], noise[-1]]))[0, 1] > 0.999


@pytest.mark.parametrize(("guidance", "expected"), [(0.0, [0.1, 0.1]), (1.0, [-0.4, 0.2]), (2.0, [-0.9, 0.3])])
def test_sampling_finds_the_image_of_a_network_that_knows_it(guidance, expected, monkeypatch):
    diffusion = make_diffusion(guidance=guidance)
    known = torch.tensor([-0.4, 0.2, 0.0, 0.1])  # of each condition; the last one is none

    def find_noise(self, x, steps, conditions):
        signal = self.alphas_cumprod[steps].float().reshape(-1, 1, 1, 1)
        return (x - signal.sqrt() * known[conditions].reshape(-1, 1, 1, 1)) / (1 - signal).sqrt()

    monkeypatch.setattr(ConditionalDiffusion, "forward", find_noise)
    pixels = diffusion.generate(torch.tensor([0, 1]), ("key",)).float()
    values = torch.tensor(expected)[:, None, None, None].expand(2, 1, 4, 4)
    torch.testing.assert_close(pixels / 127.5 - 1, values, rtol=0, atol=1 / 255)


def test_sampling_keeps_predicted_images_within_the_range_of_pixels(monkeypatch):
    limits = []
    monkeypatch.setattr(
        conditional_diffusion, "ddim_step", lambda x, noise, alphas, limit, **step: limits.append(limit) or (x, x)
    )
    make_diffusion().generate(torch.tensor([0]), ("key",))
    assert limits == [1.0] * 10


def test_images_depend_on_the_key_and_their_condition():
    diffusion, conditions = make_diffusion(), torch.zeros(2, dtype=torch.int64)
    images = diffusion.generate(conditions, ("a",))
    assert images.dtype == torch.uint8 and images.shape == (2, 1, 4, 4)
    assert torch.equal(images, diffusion.generate(conditions, ("a",)))
    assert not torch.equal(images, diffusion.generate(conditions, ("b",)))
    others = diffusion.generate(torch.tensor([0, 1]), ("a",))
    assert torch.equal(others[0], images[0]) and not torch.equal(others[1], images[1])


def test_processes_make_their_shares_of_the_same_images(monkeypatch):
    diffusion, conditions = make_diffusion().double(), torch.arange(5) % K
    expected, shares = diffusion.generate(conditions, ("a",)), []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda rows: shares.append(rows) or rows)
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        diffusion.generate(conditions, ("a",))
    assert torch.equal(torch.cat(shares), expected)


@pytest.mark.parametrize(("image_size", "widths"), [(1, [8]), (5, [8, 8, 8]), (4, [3, 5])])
@pytest.mark.parametrize("attention", [False, True])
def test_every_size_has_noise_of_its_shape(image_size, widths, attention):
    diffusion = make_diffusion(image_size=image_size, widths=widths, attention=attention)
    images, noise = torch.rand(2, 2, 1, image_size, image_size)
    loss = diffusion.loss(images, noise, torch.tensor([0, 99]), torch.tensor([0, K]))
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in diffusion.parameters())
    assert diffusion.generate(torch.tensor([1]), ("a",)).shape == (1, 1, image_size, image_size)


def test_the_last_step_ends_at_the_predicted_image():
    alphas = linear_alphas_cumprod(10, beta_start=0.1, beta_end=0.2)
    noise, arguments = torch.tensor([[0.0, -9.0]]), {"step": 3, "stride": 5}
    x_0, x_previous = ddim_step(torch.ones(1, 2), noise, alphas, limit=None, **arguments)
    assert torch.equal(x_0, x_previous) and x_0[0, 1] > 2
    assert torch.equal(ddim_step(torch.ones(1, 2), noise, alphas, limit=2.0, **arguments)[0], x_0.clamp(-2, 2))


def test_the_network_learns_to_find_noise():
    diffusion = make_diffusion()
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=2e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(60):
        images, noise = torch.zeros(16, 1, 4, 4), torch.randn(16, 1, 4, 4, generator=generator)
        steps = torch.randint(100, (16,), generator=generator)
        losses.append(diffusion.loss(images, noise, steps, torch.zeros(16, dtype=torch.int64)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_more_sampling_steps_than_steps_are_refused():
    with pytest.raises(InputError, match=r"num_sampling_steps is 101, .*set method\.diffusion\.num_sampling_steps=100"):
        make_diffusion(num_sampling_steps=101)


def test_without_diffusers_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r"diffusers is not installed; expected .*pip install diffusers"):
        make_diffusion()
