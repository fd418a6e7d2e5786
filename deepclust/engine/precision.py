"""A decorator that keeps losses, prototypes and assignments out of reduced precision."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

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
