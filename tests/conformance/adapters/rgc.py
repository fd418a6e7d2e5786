"""RGC: quantities of the authors' code, computed with the functions that training uses."""

import torch
from scipy.sparse import csr_array

from deepclust.backbones.identity import Identity
from deepclust.clustering.graph_smoothing import smooth_over_graph
from deepclust.losses.contrastive import nt_xent
from deepclust.methods.rgc import (
    RGC,
    Encoder,
    QNetwork,
    cluster_divergence,
    compute_cluster_state,
    compute_paper_reward,
    compute_q_loss,
    run_lloyd,
    soft_assignments,
)

ENCODER_WEIGHTS = ("w1", "b1", "w2", "b2")
Q_WEIGHTS = ("w_node", "b_node", "w_cluster", "b_cluster", "w_out", "b_out")


def fill(network, weights):
    """Return the network with these weights, in their precision."""
    network.to(weights[0].dtype)
    with torch.no_grad():
        for p, values in zip(network.parameters(), weights, strict=True):
            p.copy_(values)
    return network


def make_encoder(inputs, activation):
    size, num_inputs = inputs["w1"].shape
    return fill(Encoder(num_inputs, size, activation), [inputs[name] for name in ENCODER_WEIGHTS])


def make_q_network(inputs):
    hidden_size, embedding_size = inputs["w_node"].shape
    network = QNetwork(embedding_size, hidden_size, len(inputs["w_out"]))
    return fill(network, [inputs[name] for name in Q_WEIGHTS])


def with_gradients(inputs, *names):
    return [inputs[name].clone().requires_grad_() for name in names]


def smooth(params, inputs):
    adjacency = csr_array(inputs["adjacency"].numpy())
    return {"smoothed": torch.from_numpy(smooth_over_graph(inputs["features"].numpy(), adjacency, params["steps"]))}


def encoder(params, inputs):
    z1, z2 = make_encoder(inputs, params["activation"])(inputs["features"])
    return {"z1": z1, "z2": z2}


def contrast_loss(params, inputs):
    z1, z2 = with_gradients(inputs, "z1", "z2")
    loss = nt_xent(z1, z2, temperature=1.0)
    loss.backward()
    return {"loss": loss, "grad_z1": z1.grad, "grad_z2": z2.grad}


def cluster_loss(params, inputs):
    (state,) = with_gradients(inputs, "state")
    q, p = soft_assignments(state, inputs["centres"])
    loss = params["weight"] * cluster_divergence(q, p)
    loss.backward()
    return {"loss": loss, "q": q, "p": p, "grad_state": state.grad}


def reward(params, inputs):
    return {"reward": compute_paper_reward(inputs["state"], inputs["centres"])}


def cluster_state(params, inputs):
    return {"cluster_state": compute_cluster_state(inputs["state"], inputs["labels"])}


def q_values(params, inputs):
    values = make_q_network(inputs)(inputs["state"], inputs["cluster_state"])
    return {"values": values, "num_clusters": values.argmax() + 2}


def q_step(params, inputs):
    network = make_q_network(inputs)

    def compute_values(states, cluster_states):
        rows = [means[~means.isnan().any(1)] for means in inputs[cluster_states]]  # the others are padding
        return torch.stack([network(*state) for state in zip(inputs[states], rows, strict=True)])

    values = compute_values("states", "cluster_states")
    next_values = compute_values("next_states", "next_cluster_states")
    loss = compute_q_loss(
        values, next_values, inputs["actions"], inputs["rewards"].to(values), discount=params["discount"]
    )
    loss.backward()
    torch.optim.Adam(network.parameters(), lr=params["lr"]).step()
    named = dict(zip(Q_WEIGHTS, network.parameters(), strict=True))
    gradients = {f"grad_{name}": p.grad for name, p in named.items()}
    return {"loss": loss} | gradients | {f"{name}_after": p for name, p in named.items()}


def lloyd(params, inputs):
    labels, centres = run_lloyd(
        inputs["points"], inputs["start"], max_iterations=params["max_iterations"], tolerance=params["tolerance"]
    )
    return {"labels": labels, "centres": centres}


def encoder_step(params, inputs):
    """One step of a method with these weights, on all nodes at once."""
    network = make_encoder(inputs, params.get("activation", "identity"))
    size, num_inputs = inputs["w1"].shape
    method = RGC(
        backbone=Identity(in_channels=num_inputs, image_size=1),
        **{"num_images": len(inputs["features"]), "num_neighbors": 1, "max_components": num_inputs},
        **{"smoothing_steps": 0, "embedding_size": size, "activation": "identity", "cluster_weight": params["weight"]},
        **{"num_clusters": len(inputs["centres"]), "min_clusters": 1, "max_clusters": 1, "reward": "paper"},
        **{"epsilon": 1.0, "buffer_size": 1, "q_hidden_size": 1, "q_epochs": 0, "q_lr": 1.0, "discount": 0.0},
        **{"kmeans_starts": 1, "kmeans_max_iterations": 1, "kmeans_tolerance": 0.0},
        **{"optimizer": torch.optim.Adam, "schedule": None},
    )
    method.encoder = network
    terms = method.compute_terms(*network(inputs["features"]), inputs["centres"])
    loss = sum(terms.values())
    loss.backward()
    torch.optim.Adam(network.parameters(), lr=params["lr"]).step()
    named = dict(zip(ENCODER_WEIGHTS, network.parameters(), strict=True))
    next_state = method.embed(inputs["features"])
    return {"loss": loss, "next_state": next_state} | {f"{name}_after": p for name, p in named.items()}


ADAPTERS = {
    "smooth": smooth,
    "encoder": encoder,
    "contrast_loss": contrast_loss,
    "cluster_loss": cluster_loss,
    "reward": reward,
    "cluster_state": cluster_state,
    "q_values": q_values,
    "q_step": q_step,
    "lloyd": lloyd,
    "encoder_step": encoder_step,
}
