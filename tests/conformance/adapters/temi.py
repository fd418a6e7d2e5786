"""TEMI: quantities of the authors' code, computed with the functions that training uses."""

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from deepclust.backbones.identity import Identity
from deepclust.batch import Draws, TrainBatch
from deepclust.clustering.neighbors import mine_neighbors, nearest_neighbors
from deepclust.methods.scan import scan_losses
from deepclust.methods.temi import TEMI, feature_statistics, pair_weights
from deepclust.metrics import compute_scores, overclustering_accuracy
from deepclust.nn.schedules import Constant, InclusiveWarmupCosine

NAMES = {  # of the parameters of a head in the cases, and here
    "w1": "hidden_weight",
    "b1": "hidden_bias",
    "w2": "bottleneck_weight",
    "b2": "bottleneck_bias",
    "gain": "gain",
    "direction": "direction",
}


def make_method(params, *, heads, clusters, features=1, hidden=1, bottleneck=1, num_images=2, standardize=False):
    """Return a method whose backbone gives vectors back, in float32."""
    return TEMI(
        backbone=Identity(in_channels=features, image_size=1),
        num_images=num_images,
        num_clusters=clusters,
        num_heads=heads,
        hidden_size=hidden,
        bottleneck_size=bottleneck,
        standardize=standardize,
        ema_decay=params.get("teacher_momentum", 0.996),
        frozen_epochs=params.get("frozen_epochs", 0),
        num_neighbors=1,
        beta=params.get("beta", 0.6),
        temperature=params.get("student_temperature", 0.1),
        target_temperature=params.get("teacher_temperature", 0.1),
        marginal_momentum=params.get("marginal_momentum", 0.9),
        optimizer=partial(torch.optim.AdamW, lr=1.0, weight_decay=params.get("weight_decay", 0.0)),
        schedule=Constant(),
    )


def make_method_with_heads(params, inputs, suffixes):
    """Return a method whose trained and target heads have the weights NAME + suffix of the inputs, in their dtype."""
    weights = {ours: torch.stack([inputs[name + s] for s in suffixes]) for name, ours in NAMES.items()}
    method = make_method(
        params,
        heads=len(suffixes),
        clusters=weights["gain"].shape[1],
        features=weights["hidden_weight"].shape[2],
        hidden=weights["hidden_weight"].shape[1],
        bottleneck=weights["bottleneck_weight"].shape[1],
    ).to(weights["gain"].dtype)
    for heads in (method.heads, method.target_heads):
        heads.load_state_dict(weights)
    return method


def temi_loss(params, inputs):
    """Return the step of the whole method from the logits of its heads on."""
    logits, target_logits = inputs["student_logits"].clone().requires_grad_(), inputs["teacher_logits"]
    method = make_method(params, heads=len(logits), clusters=logits.shape[2]).to(logits.dtype)
    method.marginals.copy_(inputs["marginal"])
    loss = method.compute_terms(logits, target_logits)["information"]
    loss.backward()
    return {
        "head_losses": method.head_losses / (logits.shape[1] // 2),
        "loss": loss,
        "weights": pair_weights((target_logits / method.target_temperature).log_softmax(2)),
        "marginal_after": method.marginals,
        "grad_student_logits": logits.grad,
    }


def head(params, inputs):
    heads = make_method_with_heads(params, inputs, [""]).heads
    embeddings = inputs["embeddings"].clone().requires_grad_()
    logits = heads(embeddings)[0]
    (logits * inputs["weight_of_logits"]).sum().backward()
    gradients = {f"grad_{name}": getattr(heads, ours).grad[0] for name, ours in NAMES.items()}
    return {"logits": logits, "grad_embeddings": embeddings.grad, **gradients}


def train_steps(params, inputs):
    suffixes = [f"_{h}" for h in range(params["heads"])]
    method = make_method_with_heads(params, inputs, suffixes)
    optimizer = method.make_optimizer(method.parameter_groups())
    head_losses = []
    for step, (rows, rate) in enumerate(zip(inputs["batches"], inputs["learning_rates"].tolist(), strict=True)):
        epoch, position = divmod(step, params["steps_per_epoch"])
        method._trainer = SimpleNamespace(current_epoch=epoch)
        if position == 0:
            method.on_train_epoch_start()
        before = method.head_losses.clone()
        images, neighbors = rows.chunk(2)
        draws = Draws(key=(0,), first_row=0, global_batch_size=len(images))
        batch = TrainBatch((images,), torch.arange(len(images)), draws, companion_views=(neighbors,))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        sum(method.losses(batch).values()).backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.update_target()
        head_losses.append((method.head_losses - before) / len(images))
    outputs = {"head_losses": torch.stack(head_losses), "marginal_after": method.marginals}
    for kind, heads in (("student", method.heads), ("teacher", method.target_heads)):
        for h, suffix in enumerate(suffixes):
            outputs |= {f"{kind}_{name}{suffix}": getattr(heads, ours)[h] for name, ours in NAMES.items()}
    return outputs


def learning_rates(params, inputs):
    steps, base = params["steps_per_epoch"], params["base"]
    schedule = InclusiveWarmupCosine(
        warmup_epochs=params["warmup_epochs"], epochs=params["epochs"], floor=params["final"] / base
    )
    rates = [base * schedule(step + 1, steps) for step in range(params["epochs"] * steps)]
    return {"rates": torch.tensor(rates, dtype=torch.float64)}


def neighbours(params, inputs):
    rows, k = F.normalize(inputs["embeddings"], dim=1), params["k"]
    similarities, _ = nearest_neighbors(rows, rows, k, metric="inner_product", exclude=torch.arange(len(rows)))
    return {"neighbours": mine_neighbors(inputs["embeddings"], k)[:, 1:], "similarities": similarities}


def standardise(params, inputs):
    train = inputs["train"]
    method = make_method(params, heads=1, clusters=2, features=train.shape[1], standardize=True).to(train.dtype)
    method.feature_mean, method.feature_std = feature_statistics(train)
    return {"standardised": method.scale_features(inputs["embeddings"])}


def predict(params, inputs):
    method = make_method_with_heads(params, inputs, [f"_{h}" for h in range(params["heads"])])
    method.head_losses.copy_(inputs["mean_losses"])
    return {"labels": method.cluster_logits(inputs["embeddings"]).argmax(1), "head": method.head_losses.argmin()}


def overclustering_scores(params, inputs):
    classes, clusters = inputs["classes"], inputs["clusters"]
    table = torch.zeros(int(classes.max()) + 1, int(clusters.max()) + 1, dtype=torch.int64)
    table.index_put_((classes, clusters), torch.ones_like(classes), accumulate=True)
    scores = compute_scores(table)
    values = [overclustering_accuracy(table), scores["nmi"], scores["ami"], scores["ari"]]
    return {"scores": 100 * torch.tensor(values, dtype=torch.float64)}


def scan_loss(params, inputs):
    """Return SCAN's loss as the authors of TEMI compute it: both ways round, with targets as the neighbours."""
    logits = inputs["student_logits"].clone().requires_grad_()
    anchors = (logits / params["student_temperature"]).unflatten(0, (2, -1))
    neighbors = (inputs["teacher_logits"] / params["teacher_temperature"]).unflatten(0, (2, -1)).flip(0)
    consistency, entropies = scan_losses(anchors, neighbors)
    loss = (consistency - params["entropy_weight"] * entropies).mean()
    loss.backward()
    return {"loss": loss, "grad_student_logits": logits.grad}


ADAPTERS = {
    "temi_loss": temi_loss,
    "head": head,
    "train_steps": train_steps,
    "learning_rates": learning_rates,
    "neighbours": neighbours,
    "standardise": standardise,
    "predict": predict,
    "overclustering_scores": overclustering_scores,
    "scan_loss": scan_loss,
}
