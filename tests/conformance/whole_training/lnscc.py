"""LNSCC: their network, losses, k-means of the centres and training loop, on pairs of the graph of this package."""

import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from deepclust.clustering.kmeans import kmeans
from deepclust.clustering.neighbor_graph import PartnerSampler, build_neighbor_graph, compute_multiplicities
from tests.conformance.whole_training.authors import authors_code
from tests.conformance.whole_training.given import (
    GivenDraws,
    build_method,
    fit,
    make_images,
    read_weights,
    set_weights,
)

# a and b of min_dist 0.1 and spread 1, given to both: where SciPy's fit ends depends on the processor, by 1e-10.
SIMILARITY = 1.5769434604, 0.8950608781
CASES = {
    "cifar10": {
        **{"M": 60, "K": 4, "size": 4, "B": 20, "drop_last": True, "view_noise": 0.0, "epochs": 4},
        "overrides": [
            "experiment=lnscc_cifar10",
            "dataset=cifar10",
            "method.backbone.channels=3",
            "method.backbone.image_size=4",
            "method.num_neighbors=8",
            # A third of the batches each; their code clusters after 1.5 times the batches before the centres.
            "method.centres_after_epochs=2",
            "method.clustering_after_epochs=3",
        ],
    }
}


def train_ours(case: dict) -> dict:
    method, cfg = build_method(case)
    method.a, method.b = SIMILARITY
    set_weights(method)
    return fit(method, cfg, case, num_views=1) | read_weights(method, skip=("shares",))


class KMeans:
    """Stands in for scikit-learn's k-means, which has other starts: the runs of this package, one after the other."""

    key: tuple = ()
    run = 0

    def __init__(self, *, n_clusters: int, **options: object) -> None:
        self.num_clusters = n_clusters

    def fit_predict(self, features: np.ndarray) -> np.ndarray:
        result = kmeans(
            torch.from_numpy(features),
            num_clusters=self.num_clusters,
            metric="euclidean",
            restarts=[KMeans.run],
            max_iterations=300,
            tolerance=1e-4,
            key=KMeans.key,
        )
        KMeans.run += 1
        self.cluster_centers_ = result.centroids.numpy()
        return result.assignments.numpy()


def train_authors(case: dict, code: Path) -> dict:
    images = make_images(case)
    method, cfg = build_method(case)
    rows = images.images.flatten(1)
    graph = build_neighbor_graph(rows, cfg.method.num_neighbors)
    counts = compute_multiplicities(graph.weights, max_multiplicity=cfg.method.max_multiplicity)
    partners, heads, tails, draws = PartnerSampler(graph, counts), [], [], []
    for epoch in range(case["epochs"]):
        for number, indices in enumerate(images.batches(epoch)):
            draws.append(GivenDraws((0, epoch, number), 0, len(indices)))
            heads.append(indices)
            tails.append(partners.draw(indices, draws[-1].make_generator("companions")))
    umap = types.SimpleNamespace(find_ab_params=lambda spread, min_dist: SIMILARITY)
    given = {"umap": types.SimpleNamespace(umap_=umap), "umap.umap_": umap}
    given["tqdm"] = types.SimpleNamespace(tqdm=lambda steps, **options: steps)
    with authors_code(code, absent=("matplotlib", "matplotlib.pyplot"), given=given):
        import lnscc_train

        steps_per_epoch = len(images.batches(0))
        lnscc_train.Config.clustering_iter = cfg.method.centres_after_epochs * steps_per_epoch
        config = lnscc_train.Config(
            batch_size=case["B"],
            num_clusters=case["K"],
            dim=cfg.method.backbone.num_features,
            lr=cfg.method.optimizer.lr,
            clustering_iter=lnscc_train.Config.clustering_iter,
        )
        lnscc_train.KMeans = KMeans
        edges = [torch.cat(indices).numpy() for indices in (heads, tails)]
        trainer = lnscc_train.TorchTrainer(rows.numpy(), None, None, *edges, config, rows.numpy(), None)
        trainer.data = rows.numpy()  # they make it float32
        copy_initial_weights(trainer.model, method)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # the first step has dropout; after it their loop stays in evaluation mode
        trainer._save_visualization_train = trainer._save_visualization_test = lambda *a: trainer.model.eval()
        perform, losses = trainer.perform_desired_kmeans, []

        def perform_from_first_run(features):
            KMeans.run, KMeans.key = 0, (0, "e_step", cfg.method.centres_after_epochs)
            return perform(features)

        remaining = iter(draws)

        def permute(size):
            return original_randperm(size, generator=next(remaining).make_generator("negatives"))

        def backward(loss, *args, **options):
            losses.append(float(loss))
            original_backward(loss, *args, **options)

        original_randperm, original_backward = torch.randperm, torch.Tensor.backward
        trainer.perform_desired_kmeans = perform_from_first_run
        with (
            mock.patch.object(torch, "randperm", permute),
            mock.patch.object(torch.Tensor, "backward", backward),
            mock.patch.object(np.random, "permutation", np.arange),
        ):
            trainer.train(epochs=1)
        result = {"loss": torch.tensor(losses)}
        names = [name for name, _ in method.named_parameters()]
        return result | {f"weight.{name}": p.detach() for name, p in pair_parameters(trainer.model, names)}


def copy_initial_weights(model, method) -> None:
    set_weights(method)
    ours = dict(method.named_parameters())
    with torch.no_grad():
        for name, parameter in pair_parameters(model, list(ours)):
            parameter.copy_(ours[name])


def pair_parameters(model, names: list[str]) -> list:
    """Return the parameters of their network with our names, which are in the same order but for the centres."""
    theirs = [p for name, p in model.named_parameters() if name != "cluster_layer"]
    others = [name for name in names if name != "centres"]
    return [("centres", model.cluster_layer), *zip(others, theirs, strict=True)]
