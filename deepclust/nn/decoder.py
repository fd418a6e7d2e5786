"""The decoder of an earlier run, for methods that go on training an auto-encoder."""

from torch import nn

from deepclust.errors import InputError


def find_decoder(earlier: nn.Module, *, autoencoder: str) -> nn.Module:
    """Return the decoder of the method of an earlier run; `autoencoder` is the name of a method that has one.

    Raises:
        InputError: if it has none.
    """
    decoder = getattr(earlier, "decoder", None)
    if not isinstance(decoder, nn.Module):
        raise InputError(
            f"the earlier run is of {type(earlier).__name__}, which has no decoder to train on",
            expected=f"a run of method={autoencoder}, or no reconstruction loss",
            do="set method.reconstruction_weight=0, or start from another run",
        )
    return decoder
