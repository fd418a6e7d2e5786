"""Where reduced precision stops: losses, prototypes and assignments."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def full_precision(function: F) -> F:
    """`function` with autocast off and its half and bfloat16 tensors raised to float32; float64 stays float64."""

    def raised(value: Any) -> Any:
        low = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if low else value

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        device = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*map(raised, args), **{name: raised(value) for name, value in kwargs.items()})

    return wrapper  # type: ignore[return-value]
