"""Types of arguments whose own signatures say too little: those of optimisers and of Lightning's Trainer."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from deepclust.number_types import Fraction, FractionBelowOne, NonNegativeFloat, NonNegativeInt, PositiveInt

OPTIMIZER_ARGUMENTS: dict[str, Any] = {
    "lr": NonNegativeFloat,
    "weight_decay": NonNegativeFloat,
    "momentum": Fraction,
    "dampening": Fraction,
    "betas": tuple[FractionBelowOne, FractionBelowOne],
    "alpha": Fraction,
    "eps": NonNegativeFloat,
    "trust_coeff": NonNegativeFloat,
    "nesterov": bool,
    "amsgrad": bool,
    "maximize": bool,
    "foreach": bool | None,
    "fused": bool | None,
    "capturable": bool,
    "differentiable": bool,
}
BatchLimit = Annotated[int, Ge(0)] | Fraction  # batches, or a share of an epoch
TRAINER_ARGUMENTS: dict[str, Any] = {
    "max_epochs": NonNegativeInt,
    "min_epochs": NonNegativeInt | None,
    "max_steps": Annotated[int, Ge(-1), Le(2**63 - 1)],
    "min_steps": NonNegativeInt | None,
    "devices": PositiveInt | Literal["auto"],
    "num_nodes": PositiveInt,
    "log_every_n_steps": PositiveInt,  # ours; logger=none logs nothing
    "num_sanity_val_steps": NonNegativeInt,
    "accumulate_grad_batches": PositiveInt,
    "gradient_clip_val": NonNegativeFloat | None,
    "gradient_clip_algorithm": str | None,
    "limit_train_batches": BatchLimit | None,
    "limit_val_batches": BatchLimit | None,
    "overfit_batches": BatchLimit,
    "check_val_every_n_epoch": PositiveInt | None,
    "reload_dataloaders_every_n_epochs": NonNegativeInt,
    "benchmark": bool | None,
    "use_distributed_sampler": bool,
    "fast_dev_run": bool | NonNegativeInt,
    "precision": Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", 64, 32, 16]
    | Literal["64", "32", "16", "bf16"],
}


def find_foreign_types(target: Any) -> dict[str, Any]:
    """Return the types of arguments of a target that is a class of another package; none for others."""
    if not isinstance(target, type) or target.__module__.startswith("deepclust"):
        return {}
    bases = {f"{base.__module__}.{base.__name__}" for base in target.__mro__}
    if "torch.optim.optimizer.Optimizer" in bases:
        return OPTIMIZER_ARGUMENTS
    return TRAINER_ARGUMENTS if "lightning.pytorch.trainer.trainer.Trainer" in bases else {}
