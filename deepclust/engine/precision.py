"""Which precisions a run may have, and a decorator that keeps losses and assignments out of the reduced ones."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepclust.errors import InputError

# Every method trains in these. With weights in 16 bits, as in bf16-true and 16-true, small steps of optimisers and of
# target networks would be rounded away, and losses and assignments, which are computed in 32 bits, would not fit them.
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
SHORT_NAMES = ("32", "64", "bf16", "16")  # Lightning's own for PRECISIONS, in the same order


def check_precision(precision: Any, *, key: str) -> None:
    """Check that every method trains in this precision, the value of the key `key`; None is Lightning's default.

    Raises:
        InputError: if not; it names the key.
    """
    if precision is not None and str(precision) not in (*PRECISIONS, *SHORT_NAMES):
        advice = next((name for name in PRECISIONS if name == str(precision).replace("true", "mixed")), "32-true")
        raise InputError(f"{key} is {precision}", expected=f"one of {', '.join(PRECISIONS)}", do=f"set {key}={advice}")


F = TypeVar("F", bound=Callable[..., Any])


def full_precision(function: F) -> F:
    """Run `function` with autocast off and its float16 and bfloat16 arguments as float32; float64 stays float64."""

    def to_full_precision(value: Any) -> Any:
        is_reduced = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if is_reduced else value

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        device = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(
                *map(to_full_precision, args), **{name: to_full_precision(value) for name, value in kwargs.items()}
            )

    return wrapper  # type: ignore[return-value]
