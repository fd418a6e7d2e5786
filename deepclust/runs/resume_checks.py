"""The recipe of a run, what decides on what is learned: a run goes on only with the recipe that it began with."""

from typing import Any

from deepclust.errors import InputError

RECIPE_KEYS = (
    *("backbone", "method", "dataset", "views", "view_names", "multi_view"),
    *("seed", "batch_size", "drop_last", "sync_batchnorm"),
)
# Arguments of the trainer that change nothing in what is learned, or are meant to change: a run may go on for longer.
NOT_LEARNED = (
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "benchmark", "deterministic"),
    *("max_epochs", "max_steps", "max_time", "num_sanity_val_steps", "use_distributed_sampler", "log_every_n_steps"),
    *("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger", "callbacks", "profiler"),
)


def check_same_recipe(checkpoint: dict[str, Any], config: dict[str, Any], *, allow_open_values: bool = False) -> None:
    """Refuse to go on from a checkpoint that another recipe made.

    With `allow_open_values`, keys of `config` that are filled in once the images are known may still be null or auto.

    Raises:
        InputError: naming the first key that differs.
    """
    saved, current = extract_recipe(checkpoint["config"]), extract_recipe(config)
    for key in sorted({*saved, *current}):
        if allow_open_values and current.get(key) in (None, "auto"):
            continue
        if saved.get(key) != current.get(key):
            cure = "give the same start=DIR" if key.startswith("earlier") else f"set {key}={saved.get(key)}"
            raise InputError(
                f"the checkpoint in this folder was made with {key}={saved.get(key)}, this run has {current.get(key)}",
                expected="the same recipe when a run goes on",
                do=f"{cure}, or start in another folder (hydra.run.dir=DIR)",
            )


def extract_recipe(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a configuration that decides on what is learned, by dotted key."""
    sections = {name: config.get(name) for name in RECIPE_KEYS}
    sections["earlier"] = {"sha256": config["earlier"]["sha256"]}  # wherever that run's folder lies by now
    trainer = config["trainer"]
    sections["trainer"] = {name: trainer[name] for name in trainer if name not in NOT_LEARNED}
    sections["hardware"] = {"precision": config["hardware"]["precision"]}
    values = {key: value for name, node in sections.items() for key, value in flatten_section(node, name).items()}
    values.pop("dataset.source.data_dir", None)  # where decoded images are kept
    return values


def flatten_section(node: Any, prefix: str) -> dict[str, Any]:
    """Return the leaves of a nested section by dotted key."""
    if isinstance(node, dict):
        return {k: v for name, child in node.items() for k, v in flatten_section(child, f"{prefix}.{name}").items()}
    return {prefix: node}
