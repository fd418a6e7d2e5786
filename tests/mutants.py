"""Mutation testing: change the code at random places, one at a time, and see whether the quick tests notice.

`make mutants MODULE=deepclust/losses SAMPLE=36 SEED=0` calls it. A mutant differs from a module in one operator,
comparison, constant, sign or condition. It is killed if one of the tests that cover the module fails or takes too long.
A mutant that survives shows a line which no test holds, unless `tests/mutants.md` says why nobody could notice it.

Mutants are written into copies of the tree, so that the tree itself stays as it is and processes that tests start see
the mutant too. The tests of each mutant run in a fork of this process, which has imported the large libraries.

No published tool does this here: mutmut leaves out functions with decorators, which most losses have; cosmic-ray starts
Python anew for each mutant, takes no samples, and half of its mutants put operators for integers between floats.
"""

import argparse
import ast
import contextlib
import copy
import importlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARGUED = ROOT / "tests/mutants.md"
CONTRACT = "tests/methods/test_contract.py"  # trains every method; of these tests only those of a method itself
LIBRARIES = ["lightning", "torchmetrics", "hydra", "pydantic", "hypothesis", "scipy.optimize", "sklearn.cluster"]
LIBRARIES += ["sklearn.datasets", "networkx", "matplotlib.pyplot", "timm", "diffusers.models.unets.unet_2d"]
MAX_INDIRECT_FILES = 6  # of tests that mirror what imports a module
MAX_CPU_SECONDS, MAX_SECONDS = 400, 1800  # of the tests of a mutant, of which some never end

PAIRS = [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.And, ast.Or)]
PAIRS += [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn)]
OTHER = {**dict(PAIRS), **{b: a for a, b in PAIRS}, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult}
REVERSED = {ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt}
# What only readers and wrong callers see: types, messages, and arguments that guard against mistakes
UNSEEN_FIELDS = {"annotation", "returns"}
UNSEEN_NODES = (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom)
UNSEEN_ARGUMENTS = {"strict", "frozen", "kw_only"}


@dataclass(frozen=True)
class Mutant:
    """A module with one change: `before` and `after` are the changed lines, `source` is the whole text."""

    module: str  # its path in the tree
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"`{self.module}`: `{self.before}` => `{self.after}`"

    def is_argued_in(self, text: str) -> bool:
        """Return whether a text gives a reason for this mutant, or for all mutants of the line."""
        return any(f"- {entry}:" in text for entry in (self, f"`{self.module}`: `{self.before}`"))


def find_mutants(module: str, source: str) -> list[Mutant]:
    """Return all mutants of the source text of a module."""
    mutants, lines = [], source.encode().splitlines(keepends=True)
    for node in iterate_seen_nodes(ast.parse(source)):
        for old, new in find_replacements(node):
            first, last = old.lineno - 1, old.end_lineno - 1
            code = ast.unparse(new) if isinstance(old, ast.stmt) else f"({ast.unparse(new)})"
            changed = lines[first][: old.col_offset] + code.encode() + lines[last][old.end_col_offset :]
            text = b"".join([*lines[:first], changed, *lines[last + 1 :]]).decode()
            mutants.append(Mutant(module, join_lines(lines[first : last + 1]), join_lines([changed]), text))
    return mutants


def join_lines(lines: list[bytes]) -> str:
    """Return lines of code as one, without comments."""
    return " ".join(line.decode().partition("  #")[0].strip() for line in lines)


def iterate_seen_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Iterate over a node and all nodes below it that change what is computed."""
    if isinstance(node, UNSEEN_NODES) or (isinstance(node, ast.keyword) and node.arg in UNSEEN_ARGUMENTS):
        return
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in UNSEEN_FIELDS:
                yield from iterate_seen_nodes(child)


def find_replacements(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Iterate over the mutations of a node: a part of the tree that has a position, and what takes its place."""
    match node:
        case ast.BinOp() | ast.BoolOp() | ast.AugAssign() if type(node.op) in OTHER:
            yield node, replace(node, op=OTHER[type(node.op)]())
        case ast.Compare():
            for i, operator in enumerate(node.ops):
                for other in filter(None, (OTHER[type(operator)], REVERSED.get(type(operator)))):
                    yield node, replace(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
        case ast.UnaryOp():
            yield node, node.operand
        case ast.If(test=condition) | ast.IfExp(test=condition) | ast.While(test=condition):
            if isinstance(condition, ast.Name | ast.Attribute | ast.Call | ast.NamedExpr):
                yield condition, ast.UnaryOp(ast.Not(), condition)
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield from ((node, ast.Constant(value + step)) for step in (1, -1))
        case ast.Constant(value=float(value)):
            # Of a tiny number, which keeps something from being 0, only the order of magnitude counts.
            yield node, ast.Constant(value + 1 if abs(value) < 1e-4 else 2 * value)


def replace(node: ast.AST, **fields: object) -> ast.AST:
    """Return a copy of a node with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def read_importers() -> dict[str, set[str]]:
    """Return which files of the tree import each module, by its path."""
    importers: dict[str, set[str]] = {}
    for path in [*ROOT.glob("deepclust/**/*.py"), *ROOT.glob("tests/**/*.py")]:
        for module, names in re.findall(r"^ *from (deepclust[\w.]*) import (\([^)]*\)|.*)", path.read_text(), re.M):
            for name in [module, *(f"{module}.{name}" for name in re.findall(r"\w+", names))]:
                importers.setdefault(f"{name.replace('.', '/')}.py", set()).add(str(path.relative_to(ROOT)))
    return importers


def find_tests(module: str, importers: dict[str, set[str]]) -> list[str]:
    """Return the arguments with which pytest runs the quick tests that cover a module, the nearest ones first.

    These are the files that mirror the module or import it, some that mirror what imports it, the recorded numbers of
    methods among all these, and for a method the tests that all methods share.
    """
    users = {module, *importers.get(module, set())}
    adapters = {path for user in users for path in importers.get(user, set()) if "/adapters/" in path}
    tests = [path for path in users if Path(path).name.startswith("test_") and path != CONTRACT]
    files = [mirror(module), *sorted(tests), *[mirror(user) for user in sorted(users)][:MAX_INDIRECT_FILES]]
    files = [path for path in dict.fromkeys(files) if (ROOT / path).exists()]
    keywords = [Path(path).name for path in files]
    if adapters:
        files.append("tests/conformance/test_vectors.py")
        keywords += [f"[{Path(path).stem}-" for path in sorted(adapters)]
    if module.startswith("deepclust/methods/"):
        files.append(CONTRACT)
        keywords.append(f"[{Path(module).stem}]")
    return ["-m", "not slow", "-k", " or ".join(keywords), *files] if files else []


def mirror(module: str) -> str:
    """Return where the tests of a module stand."""
    return re.sub(r"^deepclust/(.*?)(\w+)\.py$", r"tests/\1test_\2.py", module)


def try_mutant(task: tuple[Mutant, list[str]]) -> tuple[Mutant, str | None]:
    """Return a mutant with the first of its tests that failed, or else how they ended; None if they passed."""
    mutant, tests = task
    write_module(mutant.module, mutant.source)
    failed = run_tests(["-x", *tests]) if tests else []
    write_module(mutant.module, (ROOT / mutant.module).read_text())
    return mutant, failed[0] if failed else None


def run_tests(arguments: list[str]) -> list[str]:
    """Run pytest in a fork and in the copy of the tree; return the tests that failed, or else an exit code but 0."""
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS))
        signal.alarm(MAX_SECONDS)
        os._exit(call_pytest(arguments))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what the tests have left running
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", Path("output.txt").read_text(), re.M)
    return failed or ([] if code in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) else [f"exit code {code}"])


def call_pytest(arguments: list[str]) -> int:
    """Run pytest in a process group of its own and return its exit code; what is printed goes into a file."""
    try:
        os.setsid()
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        return pytest.main(["-p", "no:cacheprovider", "--basetemp=temporary", *arguments])
    except BaseException:
        return 99
    finally:
        sys.stdout.flush()


def write_module(module: str, source: str) -> None:
    """Write a module of the copy with a time of its own, by which Python sees that its bytecode is out of date."""
    modified_at = int(os.stat(module).st_mtime) + 1
    Path(module).write_text(source)
    os.utime(module, (modified_at, modified_at))


def enter_copy(parent: str) -> None:
    """Copy all files that git does not ignore into a new folder, and work there."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    folder = Path(tempfile.mkdtemp(dir=parent))
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    os.chdir(folder)
    sys.path[0] = os.environ["PYTHONPATH"] = str(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Change code at random places and see whether the quick tests notice.")
    parser.add_argument("modules", nargs="+", type=Path, help="modules or packages, such as deepclust/losses")
    parser.add_argument("--sample", type=int, required=True, help="number of mutants")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--processes", type=int, default=2, help="number of mutants that are tried at a time")
    arguments = parser.parse_args()
    paths = [path.resolve() for given in arguments.modules for path in sorted(given.rglob("*.py")) or [given]]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    mutants = [mutant for module, text in texts.items() for mutant in find_mutants(module, text)]
    sample = random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants)))
    tried = [mutant for mutant in sample if not mutant.is_argued_in(ARGUED.read_text())]
    importers, survivors, killers = read_importers(), 0, set()
    tasks = [(mutant, find_tests(mutant.module, importers)) for mutant in tried]
    for library in LIBRARIES:
        importlib.import_module(library)
    fork = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory(prefix="mutants_") as folder,
        fork.Pool(arguments.processes, enter_copy, [folder]) as pool,
    ):
        for mutant, killer in pool.imap_unordered(try_mutant, tasks):
            print(f"{mutant}: {killer or 'SURVIVED'}", flush=True)
            survivors += killer is None
            killers |= {killer} if killer and killer.startswith("tests/") else set()
        if killers and (broken := pool.apply(run_tests, [sorted(killers)])):
            sys.exit(f"these tests fail without a mutant, too: {', '.join(broken)}")
    print(
        f"{len(sample)} of {len(mutants)} mutants: {len(tried) - survivors} killed, {survivors} survived, "
        f"{len(sample) - len(tried)} argued in tests/mutants.md"
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
