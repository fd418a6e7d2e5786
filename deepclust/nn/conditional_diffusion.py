"""A diffusion model of images with a condition: the training of DDPM, the sampling of DDIM, classifier-free guidance.

Ho, Jain and Abbeel ("Denoising diffusion probabilistic models", NeurIPS 2020, arXiv 2006.11239) add noise e to an image
x_0, the more the later the step t, and train a network to tell the noise from the noised image

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,   a_t = product of (1 - beta) over the steps up to t, the betas linear in t

Song, Meng and Ermon ("Denoising diffusion implicit models", ICLR 2021, arXiv 2010.02502) go back from noise to an image
in few steps and without new noise. Ho and Salimans ("Classifier-free diffusion guidance", arXiv 2207.12598) also train
the network without a condition, and follow the condition beyond what the network says of it. The network is the U-Net
of the package diffusers. It sees pixels in [-1, 1].
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn

from deepclust.engine import distributed
from deepclust.engine.precision import full_precision
from deepclust.engine.progress_bar import track
from deepclust.engine.randomness import make_generator
from deepclust.errors import InputError
from deepclust.number_types import FiniteFloat, FractionBelowOne, PositiveInt

GENERATED_TOGETHER = 500  # images in a batch of sampling; changes only speed and memory


class ConditionalDiffusion(nn.Module):
    """A U-Net that tells the noise in noised images, by their steps and conditions, and makes images with that.

    It takes images x_t (N, channels, image_size, image_size), steps (N,) from 0 and conditions (N,), and returns the
    noise, of the shape of the images. Condition k < K is cluster k, and K is none.

    Args of the network:
        num_clusters: the number of clusters K.
        widths: channels of the maps. Each but the first halves the side; sides that are odd then are padded before.
        layers_per_level: number of residual blocks at each side.
        attention: whether the maps of the smallest side attend to themselves.

    Args of the diffusion:
        num_steps: the number of steps T.
        beta_start, beta_end: the betas of the first and the last step.
        num_sampling_steps: the number of steps in which images are made, at most T.
        guidance: how far the condition is followed. 0: not at all, 1: as the network says, more: beyond that.

    Raises:
        InputError: if diffusers is not installed, or there are more sampling steps than steps.
    """

    alphas_cumprod: Tensor

    def __init__(
        self,
        *,
        num_clusters: PositiveInt,
        channels: PositiveInt,
        image_size: PositiveInt,
        widths: Annotated[Sequence[PositiveInt], MinLen(1)],
        layers_per_level: PositiveInt,
        attention: bool,
        num_steps: PositiveInt,
        beta_start: FractionBelowOne,
        beta_end: FractionBelowOne,
        num_sampling_steps: PositiveInt,
        guidance: FiniteFloat,
    ) -> None:
        super().__init__()
        if num_sampling_steps > num_steps:
            raise InputError(
                f"num_sampling_steps is {num_sampling_steps}, more than num_steps={num_steps}",
                expected="at most as many",
                do=f"set method.diffusion.num_sampling_steps={num_steps}",
            )
        self.num_clusters = num_clusters
        self.image_shape = (channels, image_size, image_size)
        self.num_sampling_steps = num_sampling_steps
        self.guidance = guidance
        side_multiple = 2 ** (len(widths) - 1)
        self.padding = -image_size % side_multiple
        self.unet = make_unet(
            num_conditions=num_clusters + 1,
            channels=channels,
            image_size=image_size + self.padding,
            widths=widths,
            layers_per_level=layers_per_level,
            attention=attention,
        )
        alphas_cumprod = linear_alphas_cumprod(num_steps, beta_start=beta_start, beta_end=beta_end)
        self.register_buffer("alphas_cumprod", alphas_cumprod, persistent=False)

    def forward(self, images: Tensor, steps: Tensor, conditions: Tensor) -> Tensor:
        padded = F.pad(images, (0, self.padding, 0, self.padding))
        (noise,) = self.unet(padded, steps, class_labels=conditions, return_dict=False)
        return noise[..., : images.shape[-2], : images.shape[-1]]

    def loss(self, images: Tensor, noise: Tensor, steps: Tensor, conditions: Tensor) -> Tensor:
        """Return the mean squared error of the noise that the network finds, a scalar. (DDPM, equation 14.)

        Images in [0, 1] (N, ...) get noise of their shape, as much as at their steps (N,).
        """
        noised = add_noise(2 * images - 1, noise, self.alphas_cumprod[steps])
        return squared_error(self(noised, steps, conditions), noise)

    @torch.no_grad()
    def generate(self, conditions: Tensor, key: tuple[int | str, ...]) -> Tensor:
        """Return an image for each of the conditions (N,): pixels, uint8 (N, channels, image_size, image_size).

        The noise that they are made of depends on `key` only. Each process makes its share, and all get all images.
        """
        num_images, rank, num_processes = len(conditions), distributed.rank(), distributed.world_size()
        first, stop = (num_images * r // num_processes for r in (rank, rank + 1))
        noise = torch.randn(num_images, *self.image_shape, generator=make_generator(*key))[first:stop]
        parts = zip(noise.split(GENERATED_TOGETHER), conditions[first:stop].split(GENERATED_TOGETHER), strict=True)
        like = next(self.parameters())
        pixels = [
            self.sample(part.to(like), own_conditions)
            for part, own_conditions in track(parts, "generated images", stop - first, size=lambda part: len(part[0]))
        ]
        return distributed.all_gather(torch.cat(pixels))

    def sample(self, noise: Tensor, conditions: Tensor) -> Tensor:
        """Return an image, as pixels, uint8, for each of the conditions (N,), made of the noise (N, channels, H, W)."""
        stride = len(self.alphas_cumprod) // self.num_sampling_steps
        none = torch.full_like(conditions, self.num_clusters)
        x = noise
        for number in reversed(range(self.num_sampling_steps)):
            steps = torch.full_like(conditions, number * stride)
            found = guided_noise(self(x, steps, conditions), self(x, steps, none), guidance=self.guidance)
            _, x = ddim_step(x, found, self.alphas_cumprod, step=number * stride, stride=stride, limit=1.0)
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def make_unet(
    *,
    num_conditions: int,
    channels: int,
    image_size: int,
    widths: Sequence[int],
    layers_per_level: int,
    attention: bool,
) -> Any:
    """Return the U-Net of diffusers, a module; the arguments are those of `ConditionalDiffusion`.

    Raises:
        InputError: if diffusers is not installed.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise InputError(
            "diffusers is not installed",
            expected="it for a method that generates images by diffusion",
            do="pip install diffusers, or the extra generative",
        ) from error

    class UNet(UNet2DModel):
        """Knows its device and dtype without weights, too: TorchScript asks where an exported program has left them."""

        device = property(lambda self: next((p.device for p in self.parameters()), torch.device("cpu")))
        dtype = property(lambda self: next((p.dtype for p in self.parameters()), torch.float32))

    others = len(widths) - 1
    # Groups of normalisation hold two channels or more. Steps and conditions shift channels as a whole just before it,
    # so groups of one, as diffusers' 32 groups are where there are 32 channels, would lose them.
    return UNet(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_level,
        down_block_types=("DownBlock2D",) * others + ("AttnDownBlock2D" if attention else "DownBlock2D",),
        up_block_types=("AttnUpBlock2D" if attention else "UpBlock2D",) + ("UpBlock2D",) * others,
        add_attention=attention,
        attention_head_dim=math.gcd(8, widths[-1]),
        norm_num_groups=max(1, math.gcd(16, *widths) // 2),
        num_class_embeds=num_conditions,
    )


def linear_alphas_cumprod(num_steps: int, *, beta_start: float, beta_end: float) -> Tensor:
    """Return a_t, float64 (num_steps,): the share of an image's variance that is left at each step."""
    return (1 - torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)).cumprod(0)


@full_precision
def add_noise(images: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Return images x_0 (N, ...) with noise of their shape, each as noisy as its a_t in `alphas_cumprod` (N,) says."""
    signal = alphas_cumprod.reshape(-1, *[1] * (images.dim() - 1))
    return signal.sqrt().to(images.dtype) * images + (1 - signal).sqrt().to(images.dtype) * noise


@full_precision
def squared_error(found: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared difference of two tensors of the same shape, a scalar."""
    return F.mse_loss(found, noise)


@full_precision
def guided_noise(conditional: Tensor, unconditional: Tensor, *, guidance: float) -> Tensor:
    """Return the noise (N, ...) that sampling takes, from what the network finds with and without the condition."""
    return unconditional + guidance * (conditional - unconditional)


@full_precision
def ddim_step(
    images: Tensor, noise: Tensor, alphas_cumprod: Tensor, *, step: int, stride: int, limit: float | None
) -> tuple[Tensor, Tensor]:
    """Return the image x_0 that is predicted and the image `stride` steps earlier, both (N, ...).

    `images` are those at `step`, `noise` is what is found in them, and `alphas_cumprod` (num_steps,) are a_t of all
    steps; before the first one it is 1. x_0 is clipped to [-limit, limit], if there is a limit: at late steps its error
    is that of the noise a hundred times. (DDIM, equation 12, without random noise.)
    """
    now = alphas_cumprod[step].to(images.dtype)
    before = alphas_cumprod[step - stride].to(images.dtype) if step >= stride else torch.ones_like(now)
    x_0 = (images - (1 - now).sqrt() * noise) / now.sqrt()
    if limit is not None:
        x_0 = x_0.clamp(-limit, limit)
    return x_0, before.sqrt() * x_0 + (1 - before).sqrt() * noise
