"""The loss of auto-encoders."""

from torch import Tensor
from torch.nn.functional import mse_loss

from deepclust.engine.precision import full_precision


@full_precision
def reconstruction_loss(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Return the mean over all elements of the squared difference of two tensors of one shape, a scalar."""
    return mse_loss(reconstructions, images)
