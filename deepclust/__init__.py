"""Deep image clustering: many methods under one protocol.

Shapes are written with these letters everywhere: N images of a batch, M images of a data set, V views, D features,
K clusters, C classes (beside H, W: channels), H and W pixels.

    import deepclust

    result = deepclust.cluster("photos", num_clusters=10)
    result.labels_, result.confidence
    run = deepclust.train(method="cc", dataset="digits")

What these functions need is imported when they are first used: `import deepclust` alone takes no time.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepclust.api import cluster, load_run, train
    from deepclust.errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "__version__", "cluster", "load_run", "train"]

_MODULE_OF = {
    "InputError": "deepclust.errors",
    "cluster": "deepclust.api",
    "load_run": "deepclust.api",
    "train": "deepclust.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
