"""What lets the authors' code run on a CPU, in float64, as one process, without packages that it does not need here.

Their modules are imported from a checkout; what they ask of CUDA does nothing.
"""

import contextlib
import io
import math
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import nn

REPOSITORIES = {  # by module of this package: where the code is, and the commit of the recorded vectors
    "propos": ("https://github.com/Hzzone/ProPos", "cc35d8c"),
    "digpro": ("https://github.com/Regan-Zhang/DigPro", "dfa30b3"),
    "secu": ("https://github.com/idstcv/SeCu", "af6a992"),
    "coke": ("https://github.com/idstcv/CoKe", "77228ae"),
    "cc": ("https://github.com/Yunfan-Li/Contrastive-Clustering", "61daba8"),
    "gcc": ("https://github.com/mynameischaos/GCC", "530c11b"),
    "scan": ("https://github.com/wvangansbeke/Unsupervised-Classification", "952ec31"),
    "lnscc": ("https://github.com/xma24/lnscc", "7a233e6"),
}


@contextlib.contextmanager
def authors_code(code: Path, absent: tuple[str, ...] = (), given: dict[str, object] | None = None) -> Iterator[None]:
    """Make the modules in the folder `code` importable, and what they do on a GPU work on a CPU.

    `absent` names modules that are imported but not needed; `given` holds modules that stand in for theirs. What was
    imported meanwhile is forgotten afterwards, because the repositories have modules of the same names.
    """
    modules = {name: mock.MagicMock(name=name) for name in absent}
    # torch._six went with torch 1.13.
    modules["torch._six"] = types.SimpleNamespace(string_classes=(str, bytes), int_classes=int, inf=math.inf)
    modules |= given or {}
    before = dict(sys.modules)

    def to(tensor, *args, **options):
        args = tuple("cpu" if str(a).startswith("cuda") else a for a in args)
        return original_to(tensor, *args, **options)

    def stay(value, *args, **options):
        return value

    original_to = torch.Tensor.to
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (torch.Tensor, "cuda", stay),
            (nn.Module, "cuda", stay),
            (torch.Tensor, "to", to),
            (torch.Tensor, "float", torch.Tensor.double),
            (torch, "FloatTensor", torch.DoubleTensor),
            (sys, "path", [str(code), *sys.path]),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        sys.modules.update(modules)
        # Their progress bars and notes.
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()
            torch.set_default_dtype(dtype)
            forget_imports(code.resolve(), before, replaced=set(modules) - {"torch._six"})


def forget_imports(code: Path, before: dict[str, types.ModuleType], replaced: set[str]) -> None:
    """Take what was imported from the folder `code`, and what stood in for `replaced` modules, out of sys.modules."""
    packages = {name.partition(".")[0] for name in replaced}
    for name in set(sys.modules) - set(before):
        file = getattr(sys.modules[name], "__file__", None)
        is_theirs = isinstance(file, str) and Path(file).resolve().is_relative_to(code)
        if is_theirs or name.partition(".")[0] in packages:
            del sys.modules[name]
    sys.modules.update({name: before[name] for name in replaced if name in before})


def empty_package(name: str, folder: Path, **contents: object) -> types.ModuleType:
    """Return a package whose modules are those in `folder` but whose own code is `contents` in place of theirs."""
    package = types.ModuleType(name)
    package.__path__ = [str(folder)]
    vars(package).update(contents)
    return package


class Registry(dict):
    """Stands in for the registries of the authors' code."""

    def register(self, name: str):
        def add(item):
            self[name] = item
            return item

        return add


class Backbone(nn.Module):
    """The network of the cases whose authors build theirs with a classifier `fc` at the end, which they replace."""

    def __init__(self, layers: nn.Module, num_classes: int, num_features: int) -> None:
        super().__init__()
        self.layers = layers
        self.fc = nn.Linear(num_features, num_classes)

    def forward(self, images):
        return self.fc(self.layers(images))


def record_meter(module: types.ModuleType, name: str) -> list[float]:
    """Return a list to which the meter called `name` of the authors' training loop appends its values."""
    values: list[float] = []
    original = module.AverageMeter

    class RecordingMeter(original):
        def update(self, value, *args, **options):
            if self.name == name:
                values.append(float(value))
            super().update(value, *args, **options)

    module.AverageMeter = RecordingMeter
    return values
