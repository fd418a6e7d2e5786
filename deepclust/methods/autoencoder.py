"""The auto-encoder that DEC and the methods after it start from (Xie, Girshick and Farhadi, ICML 2016).

An encoder maps images to embeddings of ten dimensions, and a decoder maps these back. Both are trained to reconstruct
the images. The stage has no clustering of its own; k-means evaluates its embeddings. `method=dec` and `method=idec` go
on from there. With convolutions and moved images, as `method=conv_autoencoder` has them, it is the stage before DECS.

Differs from the authors' code in:
- Pre-training. All layers are trained together from the start, as in the later code by one of the authors of IDEC
  (Guo, DEC-keras), from which the figures come that are compared with. DEC's own code first trains layer by layer, for
  300,000 steps in all.

Logged: `train/reconstruction`, the mean over all pixels of the squared difference to the image.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.optim import Optimizer

from deepclust.batch import TrainBatch
from deepclust.engine import distributed
from deepclust.engine.cuda_graphs import replayable
from deepclust.losses.reconstruction import reconstruction_loss
from deepclust.methods.base import ClusteringMethod
from deepclust.nn.schedules import Schedule
from deepclust.number_types import PositiveInt


class Autoencoder(ClusteringMethod):
    """The stage before DEC: `backbone`, the encoder, and `decoder` learn to reconstruct.

    Args (`num_clusters`, `optimizer`, `schedule`: see `ClusteringMethod`):
        backbone: the encoder, from images to embeddings (N, D).
        decoder: from embeddings (N, D) to images.
    """

    num_views = 1

    def __init__(
        self,
        *,
        backbone: nn.Module,
        decoder: nn.Module,
        num_clusters: PositiveInt,
        optimizer: Callable[..., Optimizer],
        schedule: Schedule,
    ) -> None:
        super().__init__(
            backbone=backbone,
            num_clusters=num_clusters,
            optimizer=optimizer,
            schedule=schedule,
            e_step_every_n_epochs=0,
        )
        self.decoder = decoder

    def start_from(self, earlier: ClusteringMethod) -> None:
        super().start_from(earlier)
        if isinstance(decoder := getattr(earlier, "decoder", None), nn.Module):
            self.load_weights(self.decoder, decoder)

    def losses(self, batch: TrainBatch) -> dict[str, Tensor]:
        images = batch.views[0]
        terms = self.compute_terms(images, self.decoder(self.backbone(images)))
        factor = distributed.global_mean_factor(images)
        return {name: factor * term for name, term in terms.items()}

    @replayable()
    def compute_terms(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """Return the loss of `images` and their `reconstructions`, both (N, channels, H, W)."""
        return {"reconstruction": reconstruction_loss(reconstructions, images)}
