"""Who may import whom: data flows one way, and labels stay out of reach of training."""

import ast
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "deepclust"
LAYERS = {
    **dict.fromkeys(
        ("errors", "randomness", "batch", "distributed", "precision", "progress", "stopping", "graphs", "membership"), 0
    ),
    **dict.fromkeys(("views", "backbones", "heads", "losses", "clustering", "ema", "memory", "optim", "metrics"), 1),
    **dict.fromkeys(("datasets", "methods"), 2),
    **dict.fromkeys(("callbacks", "loggers"), 3),
}  # every other module is an entry point, layer 4
CONFIGURATION = {"hydra", "omegaconf"}


def test_every_folder_is_packaged():
    said = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(PACKAGE.parent).parts) for p in PACKAGE.rglob("__init__.py")}
    assert set(said) == found | {"deepclust.conf"}


def part_of(module: str) -> str:
    """The top-level part of the package that a dotted name belongs to."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "deepclust" else {module}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    inside = path.relative_to(PACKAGE).with_suffix("").parts
    layer = LAYERS.get(inside[0], 4)
    if layer < 4:
        assert not {name.split(".")[0] for name in imports(path)} & CONFIGURATION, (
            "configuration below the entry points"
        )
    for name in imports(path):
        if name.split(".")[0] != "deepclust":
            continue
        other = part_of(name)
        assert LAYERS.get(other, 4) <= layer, f"{path.name} (layer {layer}) imports {name}"
        if layer == 1 and other != inside[0]:
            assert LAYERS[other] == 0, f"{path.name} imports its neighbour {name}"
        if inside[0] in ("methods", "datasets"):
            assert other != "metrics", f"{path.name} must not know scores"
        if inside[0] == "methods":
            assert other != "datasets" and (other != "methods" or name == "deepclust.methods.base")
