"""StatDEC: the formulas of our reconstruction, computed with the functions that training uses.

The recorded assignments have the distance exponent 1.
"""

from deepclust.clustering.cluster_statistics import ClusterStatistics, average_statistics, pool_statistics
from deepclust.methods.statdec import consistency_loss, size_aware_logits
from tests.conformance.adapters.dec import make_leaves


def statistics_pooling(params, inputs):
    pooled = pool_statistics(inputs["z"], inputs["weights"], variance_floor=params["variance_floor"])
    return {"count": pooled.sizes, "mean": pooled.means, "variance": pooled.variances}


def size_aware_assignment(params, inputs):
    (z,) = make_leaves(inputs, "z")
    statistics = ClusterStatistics(inputs["count"], inputs["mean"], inputs["variance"])
    numbers = {"size_exponent": params["eta"], "num_images": params["num_images"]}
    logits = size_aware_logits(z, statistics, distance_exponent=params.get("distance_exponent", 1.0), **numbers)
    outputs = {"q": logits.softmax(1)}
    if "upstream" in inputs:
        (inputs["upstream"] * outputs["q"]).sum().backward()
        outputs["grad_z"] = z.grad
    return outputs


def running_statistics(params, inputs):
    earlier, later = (
        ClusterStatistics(*(inputs[f"{name}{suffix}"] for name in ("count", "mean", "variance")))
        for suffix in ("", "_batch")
    )
    after = average_statistics(earlier, later, decay=params["momentum"])
    return {"count_after": after.sizes, "mean_after": after.means, "variance_after": after.variances}


def consistency(params, inputs):
    a, b = make_leaves(inputs, "a", "b")
    loss = consistency_loss(a, b)
    loss.backward()
    return {"loss": loss, "grad_a": a.grad, "grad_b": b.grad}


ADAPTERS = {
    "statistics_pooling": statistics_pooling,
    "size_aware_assignment": size_aware_assignment,
    "running_statistics": running_statistics,
    "consistency_loss": consistency,
}
