"""Who may import whom: data flows one way, and labels stay out of reach of training."""

import ast
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "deepclust"
# A room imports from the floors below it, and on floors 0, 3 and 4 from its neighbours too.
FLOORS = {
    0: {"errors", "exit_codes", "number_types", "score_names", "engine", "batch"},
    1: {"views", "backbones", "nn", "losses", "clustering", "metrics"},
    2: {"datasets", "methods"},
    3: {"callbacks", "loggers", "report", "comparison"},
    4: {"runs", "commands", "config", "cli", "testing", "api", "estimators", "result_objects"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
NEIGHBOURS = {("losses", "nn"), ("clustering", "nn")}  # (room, the neighbour on its floor that it may import)
CONFIGURATION = {"hydra", "omegaconf"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """Return the room of a dotted name below `deepclust`, '' for the package itself."""
    return module.split(".")[1] if "." in module else ""


def read_imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "deepclust" else {module}
    return found


def test_every_folder_is_packaged():
    packages = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(PACKAGE.parent).parts) for p in PACKAGE.rglob("__init__.py")}
    assert set(packages) == found | {"deepclust.conf", "hydra_plugins.deepclust"}


def test_every_room_has_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms - {"__init__"} == FLOOR_OF.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "__init__":
        if path.parent == PACKAGE:  # the door: what it names is imported when it is first used
            assert read_imports(path) == {"importlib", "typing", "deepclust.api", "deepclust.errors"}
        else:
            assert not read_imports(path)
        return
    floor = FLOOR_OF[room]
    if floor < 4:
        assert not {name.split(".")[0] for name in read_imports(path)} & CONFIGURATION, "configuration below floor 4"
    for name in read_imports(path):
        if name.split(".")[0] != "deepclust" or name == "deepclust.__version__":
            continue
        other = room_of(name)
        assert FLOOR_OF[other] <= floor, f"{path.name} (floor {floor}) imports {name}"
        if floor in (1, 2) and FLOOR_OF[other] == floor and other != room:
            assert (room, other) in NEIGHBOURS, f"{path.name} imports its neighbour {name}"
        if room in ("methods", "datasets"):
            assert other != "metrics", f"{path.name} must not know scores"
        if room == "methods":
            assert other != "methods" or name == "deepclust.methods.base", "a method never imports another"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_docstring_says_what_the_module_gives(path: Path):
    tree = ast.parse(path.read_text())
    if not tree.body:  # the mark of a package
        return
    first, *rest = (ast.get_docstring(tree) or "").split("\n")
    assert first.endswith(".") and len(first.split()) >= 4, f"{path}: one whole sentence on the first line"
    assert not rest or not rest[0], f"{path}: an empty line after the first sentence"
