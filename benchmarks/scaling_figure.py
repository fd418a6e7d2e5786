"""The figure of benchmarks/scaling.py: what was measured, beside the models, and what they say of ImageNet-1k."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from scaling_model import MODELS

COLOURS = ["#3b6fb6", "#d95f3b", "#5a9e4b", "#8a63a8", "#c9a227", "#7f7f7f"]
GATHER, STEP = "gather", "step on several processes"
MEMORY = ("memory of a step", "memory of the gather", "memory of the E-step")
TIMES = ("step", STEP, GATHER, "E-step", "time of a checkpoint")


def draw_figure(figures: Mapping[str, Any], cases_of: Callable[[str], list[dict[str, Any]]], file: Path) -> None:
    """Write the figure of all that was measured, as PNG; `cases_of` returns the cases that a model is fitted to."""
    fits = figures["fits"]
    figure, ((times, memory), (processes, plans)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    draw_fits(times, "Seconds", {name: (fits[name], cases_of(name)) for name in TIMES if name in fits})
    draw_fits(memory, "Bytes of memory", {name: (fits[name], cases_of(name)) for name in MEMORY if name in fits})
    if STEP in fits:
        draw_steps(processes, fits[STEP]["constants"], cases_of(STEP))
    if "plans" in figures:
        draw_plans(plans, figures["plans"])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_fits(axes: Axes, quantity: str, fits: Mapping[str, tuple[Mapping[str, Any], list[dict[str, Any]]]]) -> None:
    """Draw each case as a point: measured, and by the model."""
    for (name, (fit, cases)), colour in zip(fits.items(), COLOURS, strict=False):
        measured = [case[fit["quantity"]] for case in cases]
        by_model = [value * (1 + residual) for value, residual in zip(measured, fit["residuals"], strict=True)]
        label = f"{name} (median residual {fit['median_residual']:.0%})"
        axes.loglog(measured, by_model, "o", color=colour, markersize=5, alpha=0.8, label=label)
    ends = [min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])]
    axes.plot(ends, ends, color="black", linewidth=0.7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="measured", ylabel="by the model")
    axes.set_title(f"{quantity}, measured and by the models", fontsize=10)
    axes.legend(fontsize=8)


def draw_steps(axes: Axes, constants: Mapping[str, float], cases: list[dict[str, Any]]) -> None:
    """Draw a bar for each step on several processes, of the terms of its model, and a mark where it was measured."""
    bottoms = [0.0] * len(cases)
    for (name, count), colour in zip(MODELS[STEP].terms.items(), COLOURS, strict=False):
        heights = [1e3 * constants[name] * count(case) for case in cases]
        axes.bar(range(len(cases)), heights, bottom=bottoms, color=colour, label=TERMS_OF_STEP[name])
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.plot([1e3 * case["seconds"] for case in cases], "k_", markersize=18, label="measured")
    labels = [
        "\n".join(
            [
                str(case["processes"]),
                f"{case['pixels']} px",
                f"{case['parameters'] / 1e6:.1f} M",
                *(["sync."] if case.get("synchronised") else []),
            ]
        )
        for case in cases
    ]
    axes.set_xticks(range(len(cases)), labels, fontsize=7)
    axes.set_xlabel("processes, image size, weights, synchronised batch normalisation")
    axes.set_ylabel("ms")
    axes.set_title(f"A step on processes that share {cases[0]['cores']} cores (gloo)", fontsize=10)
    axes.legend(fontsize=8)


TERMS_OF_STEP = {
    "times the step of one process": "computing",
    "s a collective and other process": "collectives",
    "s a byte of gradients": "gradients",
}


def draw_plans(axes: Axes, plans: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw for each plan where the time of a GPU goes, in shares, and write images a second beside it."""
    parts: dict[str, list[float]] = {}
    for plan in plans.values():
        shares = share_batch(plan)
        for name, share in shares.items():
            parts.setdefault(name, []).append(100 * share)
    lefts = [0.0] * len(plans)
    for (name, widths), colour in zip(parts.items(), COLOURS, strict=False):
        axes.barh(range(len(plans)), widths, left=lefts, color=colour, label=name)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    labels = [f"{name}\n{plan['epoch_images_per_second']:,.0f} images/s" for name, plan in plans.items()]
    axes.set_yticks(range(len(plans)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="% of the time", xlim=(0, 100))
    axes.set_title("ImageNet-1k, ResNet-50: extrapolated", fontsize=10)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=3)


def share_batch(plan: Mapping[str, Any]) -> dict[str, float]:
    """Return the shares of an epoch in which the GPUs compute, and in which they wait for what."""
    computing = max(plan["batch, GPU"], plan["batch, host"])
    computing += plan["batch, batch normalisation"] + plan["batch, gradients"]
    seconds = {
        "GPU": plan["batch, GPU"],
        "starting kernels": max(0.0, plan["batch, host"] - plan["batch, GPU"]),
        "batch normalisation": plan["batch, batch normalisation"],
        "gradients": plan["batch, gradients"],
        "decoding": max(0.0, plan["batch"] - computing),
    }
    epoch_share = 1 - plan["e_step_share"]
    shares = {name: epoch_share * part / plan["batch"] for name, part in seconds.items()}
    return shares | {"E-step": plan["e_step_share"]}
