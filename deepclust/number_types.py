"""The types of numbers in constructors: which values an argument can take, checked where a configuration is read.

A constructor writes `temperature: PositiveFloat`, and `deepclust.config.call_checks` refuses another number, naming the
key to change. For Python the types are plain `int`, `float` and `tuple`: a direct call is not checked. NaN and infinity
are refused wherever a `float` is asked for.
"""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt, Predicate

LARGEST_INT = 2**63 - 1  # of 64 bits
LARGEST_FLOAT = 3.4e38  # of 32 bits, in which tensors are computed

AnyInt = Annotated[int, Ge(-(2**63)), Le(LARGEST_INT)]
PositiveInt = Annotated[int, Ge(1), Le(LARGEST_INT)]
NonNegativeInt = Annotated[int, Ge(0), Le(LARGEST_INT)]

FiniteFloat = Annotated[float, Ge(-LARGEST_FLOAT), Le(LARGEST_FLOAT)]
PositiveFloat = Annotated[float, Gt(0), Le(LARGEST_FLOAT)]
NonNegativeFloat = Annotated[float, Ge(0), Le(LARGEST_FLOAT)]

Fraction = Annotated[float, Ge(0), Le(1)]  # shares, probabilities, decays
PositiveFraction = Annotated[float, Gt(0), Le(1)]
FractionBelowOne = Annotated[float, Ge(0), Lt(1)]


def is_ascending(interval: tuple[float, float]) -> bool:
    """Return whether the two ends of an interval are in order; they may be equal."""
    return interval[0] <= interval[1]


Interval = Annotated[tuple[FiniteFloat, FiniteFloat], Predicate(is_ascending)]
NonNegativeInterval = Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Predicate(is_ascending)]
PositiveInterval = Annotated[tuple[PositiveFloat, PositiveFloat], Predicate(is_ascending)]
