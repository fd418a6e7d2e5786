"""What a network that was trained on ImageNet takes images for, in a word: read off its features."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from deepclust.backbones.pretrained import find_packaged_weights, load_torchvision_weights, read_state_dict

NUM_CLASSES = 1000
BLOCK_ROWS = 4096
MIN_SHARE = 0.25  # of the images of a cluster, for which a word has to stand


def read_classifier(backbone: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return weight (1000, D) and bias (1000,) of the ImageNet classifier that belongs to a pretrained backbone.

    backbone: its section of the configuration. None where there is none at hand: nothing is fetched for it, and files
    of weights of one's own may know other classes.
    """
    if (name := backbone.get("model_name")) is not None:
        file = find_packaged_weights(name) if backbone.get("pretrained") and not backbone.get("weights") else None
        return None if file is None else find_classifier(read_state_dict(file))
    weights, depth = backbone.get("weights"), backbone.get("depth")
    if depth is None or not str(weights).startswith("IMAGENET1K"):
        return None
    return find_classifier(load_torchvision_weights(f"resnet{depth}", str(weights)))


def find_classifier(state_dict: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return the last two tensors of a network if they are weight (1000, D) and bias (1000,) of a linear layer."""
    *_, weight, bias = state_dict.values()
    is_classifier = weight.ndim == 2 and len(weight) == NUM_CLASSES and bias.shape == (NUM_CLASSES,)
    return (weight.float(), bias.float()) if is_classifier else None


def predict_classes(features: NDArray[np.float32], classifier: tuple[Tensor, Tensor]) -> NDArray[np.int64]:
    """Return the ImageNet class of each row of features (M, D): (M,)."""
    weight, bias = classifier
    blocks = (features[start : start + BLOCK_ROWS] for start in range(0, len(features), BLOCK_ROWS))
    return np.concatenate(
        [nn.functional.linear(torch.from_numpy(np.asarray(b)), weight, bias).argmax(1).numpy() for b in blocks]
    )


def read_class_words() -> list[str]:
    """Return the first word or words of each ImageNet class, as timm lists them: `tench`, `English springer`."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(index).split(",")[0] for index in range(NUM_CLASSES)]


def name_clusters(assignments: NDArray[np.int64], classes: NDArray[np.int64], words: list[str]) -> dict[int, str]:
    """Return a name for each cluster whose images are mostly taken for one or two ImageNet classes.

    assignments and classes are (M,); words by class. The name is the most frequent word, followed by the second one
    where the first stands for too few of the images or is the name of another cluster too. A cluster whose two most
    frequent words together stand for less than `MIN_SHARE` of its images has no name.
    """
    ranked: dict[int, tuple[list[str], bool]] = {}
    for cluster in np.unique(assignments).tolist():
        counts = np.bincount(classes[assignments == cluster], minlength=len(words))
        first, second = np.argsort(-counts, kind="stable")[:2].tolist()
        if counts[first] + counts[second] >= MIN_SHARE * counts.sum():
            found = [words[index] for index in (first, second) if counts[index]]
            ranked[cluster] = found, bool(counts[first] >= MIN_SHARE * counts.sum())
    first_words = Counter(found[0] for found, is_clear in ranked.values() if is_clear)
    return {
        cluster: found[0] if is_clear and first_words[found[0]] == 1 else " / ".join(dict.fromkeys(found))
        for cluster, (found, is_clear) in ranked.items()
    }
