"""DEC: quantities of the authors' code, computed with the functions that training uses."""

from functools import partial

import torch
from lightning import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader

from deepclust.backbones.autoencoder import MlpDecoder, MlpEncoder
from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.student_assignments import student_logits, target_distribution, target_divergence
from deepclust.methods.autoencoder import Autoencoder
from deepclust.methods.dec import DEC
from deepclust.nn.schedules import Constant


def make_leaves(inputs, *names):
    """Return copies of the named inputs that collect gradients."""
    return [inputs[name].clone().requires_grad_() for name in names]


def soft_assignment(params, inputs):
    z, centres = make_leaves(inputs, "z", "centres")
    logits = student_logits(z, centres, alpha=params["alpha"])
    q = logits.softmax(1)
    outputs = {"q": q, "labels": q.argmax(1)}
    if "upstream" in inputs:
        (inputs["upstream"] * q).sum().backward()
    return outputs | {"grad_z": z.grad, "grad_centres": centres.grad}


def target_distribution_of_all(params, inputs):
    return {"p": target_distribution(inputs["q"])}


def kl_loss(params, inputs):
    z, centres = make_leaves(inputs, "z", "centres")
    logits = student_logits(z, centres, alpha=params["alpha"])
    loss = target_divergence(inputs["p"], logits)
    loss.backward()
    return {"q": logits.softmax(1), "loss": loss, "grad_z": z.grad, "grad_centres": centres.grad}


# Whole stages ---------------------------------------------------------------------------------------------------------


class RowsInOrder(LightningDataModule):
    """Rows (N, D) as images (N, D, 1, 1), in batches in order; the last one is short."""

    def __init__(self, rows, batch_size):
        super().__init__()
        self.fit = rows[:, :, None, None]
        self.batch_size = batch_size
        self.seed = 0

    @property
    def batches_per_epoch(self):
        return -(-len(self.fit) // self.batch_size)

    def clean_batches(self, source, device):
        yield source

    def train_dataloader(self):
        indices = torch.arange(len(self.fit)).split(self.batch_size)
        batches = [TrainBatch((self.fit[i],), i, Draws((0,), 0, len(i))) for i in indices]
        return DataLoader(batches, batch_size=None)


class KeepLosses(Callback):
    """Keeps the loss of each step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach().clone())


def list_layers(network):
    """Return the linear layers of an encoder or a decoder."""
    return [layer for layer in network.layers if isinstance(layer, torch.nn.Linear)]


def make_networks(inputs):
    """Return encoder and decoder with the weights of the case; without weights of a decoder, one of any weights."""
    num_layers = sum(name.startswith("enc_w") for name in inputs)
    sizes = [inputs["x"].shape[1], *(len(inputs[f"enc_w{i}"]) for i in range(num_layers))]
    arguments = {"channels": sizes[0], "image_size": 1, "num_features": sizes[-1], "initialization": "normal"}
    encoder = MlpEncoder(hidden_sizes=sizes[1:-1], **arguments)
    # Not all decoders of the cases mirror the encoder.
    widths = [len(inputs[f"dec_w{i}"]) for i in range(num_layers - 1)] if "dec_w0" in inputs else sizes[-2:0:-1]
    decoder = MlpDecoder(hidden_sizes=widths[::-1], **arguments)
    with torch.no_grad():
        for prefix, network in (("enc", encoder), ("dec", decoder)):
            network.to(inputs["x"].dtype)
            for i, layer in enumerate(list_layers(network)):
                if f"{prefix}_w{i}" in inputs:
                    layer.weight.copy_(inputs[f"{prefix}_w{i}"])
                    layer.bias.copy_(inputs[f"{prefix}_b{i}"])
    return encoder, decoder


def train(method, params, inputs, max_steps):
    """Train on the rows of the case and return the losses of the steps and the weights after the last one."""
    keep = KeepLosses()
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=[keep],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    method.to(inputs["x"].dtype)
    trainer.fit(method, RowsInOrder(inputs["x"], params["batch_size"]))
    outputs = {"losses": torch.stack(keep.losses) if keep.losses else inputs["x"].new_zeros(0)}
    for prefix, network in (("enc", method.backbone), ("dec", method.decoder)):
        for i, layer in enumerate(list_layers(network) if network is not None else []):
            outputs[f"{prefix}_w{i}_after"], outputs[f"{prefix}_b{i}_after"] = layer.weight, layer.bias
    return trainer, outputs


def make_optimizer(params):
    """Return what makes the optimiser of the case."""
    return partial(torch.optim.SGD, lr=params["learning_rate"], momentum=params["momentum"])


def pretrain_steps(params, inputs):
    encoder, decoder = make_networks(inputs)
    method = Autoencoder(
        backbone=encoder, decoder=decoder, num_clusters=1, optimizer=make_optimizer(params), schedule=Constant()
    )
    return train(method, params, inputs, params["steps"])[1]


def make_method(params, *, backbone, decoder, num_images, num_clusters, **settings):
    """Return DEC, or with `settings` IDEC, with the numbers of the case."""
    arguments = {
        "clustering_weight": params.get("clustering_weight", 1.0),
        "reconstruction_weight": 0.0,
        "target_every_n_steps": params.get("update_interval", 1),
        "optimizer": partial(torch.optim.SGD, lr=0.0),
        **settings,
    }
    return DEC(
        backbone=backbone,
        decoder=decoder,
        num_images=num_images,
        num_clusters=num_clusters,
        alpha=params.get("alpha", 1.0),
        stop_below=params.get("tolerance", 0.0),
        shuffle=False,
        kmeans_restarts=1,
        kmeans_max_iterations=1,
        kmeans_tolerance=0.0,
        schedule=Constant(),
        **arguments,
    )


def fit(params, inputs, **settings):
    """Return the outputs of the clustering stage, which begins at the centres and labels of the case."""
    encoder, decoder = make_networks(inputs)
    num_images, num_clusters = len(inputs["x"]), len(inputs["centres"])
    method = make_method(
        params,
        backbone=encoder,
        decoder=decoder,
        num_images=num_images,
        num_clusters=num_clusters,
        optimizer=make_optimizer(params),
        **settings,
    )
    method.has_earlier_run = True
    method.find_centres = lambda features, key: (inputs["centres"], inputs["labels"])
    trainer, outputs = train(method, params, inputs, params["max_steps"])
    return outputs | {
        "pred": method.assignments,
        "centres_after": method.centres,
        "steps": torch.tensor(trainer.global_step),
        "stopped": method.has_converged,
    }


def stopping(params, inputs):
    num_clusters = 1 + int(max(inputs["first"].max(), inputs["labels"].max()))
    backbone = torch.nn.Identity()
    backbone.num_features = 1
    method = make_method(
        params, backbone=backbone, decoder=None, num_images=len(inputs["first"]), num_clusters=num_clusters
    )
    method.assignments.copy_(inputs["first"])
    changed, stop_at = [], -1
    for refresh, labels in enumerate(inputs["labels"]):
        method.renew_targets(torch.nn.functional.one_hot(labels, num_clusters).float())
        changed.append(int(method.num_changed) / len(labels))
        if method.has_converged and stop_at < 0:
            stop_at = refresh
    return {"changed": torch.tensor(changed, dtype=torch.float64), "stop_at": torch.tensor(stop_at)}


ADAPTERS = {
    "soft_assignment": soft_assignment,
    "target_distribution": target_distribution_of_all,
    "kl_loss": kl_loss,
    "pretrain_steps": pretrain_steps,
    "dec_fit": fit,
    "stopping": stopping,
}
