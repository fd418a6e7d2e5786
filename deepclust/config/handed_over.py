"""Objects of a Python program as parts of a configuration: what cannot be imported is handed over by the caller.

A configuration names a method or a network by a dotted path, from which any process can build it again. A class of a
notebook, or a network that is there already, has no such path. Then the configuration names an attribute of this
module, `deepclust.config.handed_over.method` or `.backbone`, and the object itself stays with the program: nothing of
it is stored but its name, its checksum and, in checkpoints, its weights.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

from deepclust.errors import InputError

PREFIX = "deepclust.config.handed_over."
KINDS = ("method", "backbone")
_objects: ContextVar[dict[str, Any]] = ContextVar("_objects", default={})  # noqa: B039  it is replaced, never changed


@contextlib.contextmanager
def objects_handed_over(**objects: Any) -> Iterator[None]:
    """Let configurations be built from these objects, by kind, inside the `with` block; None is none."""
    token = _objects.set({kind: value for kind, value in objects.items() if value is not None})
    try:
        yield
    finally:
        _objects.reset(token)


def list_missing(targets: Iterable[str]) -> list[str]:
    """Return the kinds of objects that these `_target_` name and that are not handed over now."""
    named = [target.removeprefix(PREFIX) for target in targets if target.startswith(PREFIX)]
    return sorted({kind for kind in named if kind not in _objects.get()}, reverse=True)


def missing_object_error(kinds: Sequence[str], names: Mapping[str, Any]) -> InputError:
    """Return the error for a configuration whose objects are not there; `names` tells which they were, by kind."""
    known = ", ".join(str(names[kind]) for kind in kinds if names.get(kind))
    again = ", ".join(f"{kind}={kind}" for kind in kinds)
    return InputError(
        f"the run has a {' and a '.join(kinds)} that a Python program handed over as objects"
        f"{f' ({known})' if known else ''}, and this process has none",
        expected="the same again, for no file holds them",
        do=f"hand them over in Python: deepclust.load_run(DIR, {again}), or deepclust.train({again}, run_dir=DIR, ...) "
        "in one process; what a module defines can be imported again",
    )


def __getattr__(kind: str) -> Callable[..., Any]:
    if kind not in KINDS:
        raise AttributeError(kind)
    found = _objects.get().get(kind)
    if hasattr(found, "state_dict") and not isinstance(found, type):  # a network; torch need not be imported for this
        return lambda: copy.deepcopy(found)
    if found is not None:
        return found

    def refuse(**arguments: Any) -> Any:
        raise missing_object_error([kind], {})

    return refuse
