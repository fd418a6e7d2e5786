"""What `make mutants` changes in a text, and which tests it runs then."""

import ast

from tests.mutants import CONTRACT, find_mutants, find_tests, read_importers

TEXT = '''"""Text of 1 + 1 is left alone."""

from typing import Literal


def choose(rows: "int | None", limit: Literal[2, 3] = 2, eps: float = 1e-8) -> int | None:
    if rows.any():  # a call
        raise ValueError(f"{limit + 1} is " + "wrong")
    while not rows or limit > eps:
        rows += [
            limit * 0.25  # a quarter
            - 1,
        ]
    return None if zip(rows, rows, strict=True) else "ä" in rows
'''
AFTER = [
    'def choose(rows: "int | None", limit: Literal[2, 3] = (3), eps: float = 1e-8) -> int | None:',
    'def choose(rows: "int | None", limit: Literal[2, 3] = (1), eps: float = 1e-8) -> int | None:',
    'def choose(rows: "int | None", limit: Literal[2, 3] = 2, eps: float = (1.00000001)) -> int | None:',
    "if (not rows.any()):",
    "while (not rows and limit > eps):",
    "while (rows) or limit > eps:",
    "while not rows or (limit >= eps):",
    "while not rows or (limit <= eps):",
    "rows -= [limit * 0.25 - 1]",
    "(limit * 0.25 + 1),",
    "(limit / 0.25)",
    "limit * (0.5)",
    "- (2),",
    "- (0),",
    'return None if (not zip(rows, rows, strict=True)) else "ä" in rows',
    "return None if zip(rows, rows, strict=True) else ('ä' not in rows)",
]


def test_each_mutant_has_one_change_and_is_a_program():
    mutants = find_mutants("deepclust/x.py", TEXT)
    assert sorted(mutant.after for mutant in mutants) == sorted(AFTER)
    for mutant in mutants:
        ast.parse(mutant.source)
        assert len(set(TEXT.splitlines()) - set(mutant.source.splitlines())) in (1, 2, 4)
    written = {str(mutant) for mutant in mutants}
    assert "`deepclust/x.py`: `limit * 0.25` => `limit * (0.5)`" in written and len(written) == len(AFTER)


def test_the_nearest_tests_run_first():
    importers = read_importers()
    keywords, *files = find_tests("deepclust/losses/balance.py", importers)[3:]
    assert files[0] == "tests/losses/test_balance.py" and "tests/methods/test_cc.py" in files and CONTRACT not in files
    assert "[cc-" in keywords and "[secu-" not in keywords
    keywords, *files = find_tests("deepclust/methods/secu.py", importers)[3:]
    assert files[0] == "tests/methods/test_secu.py" and files[-1] == CONTRACT
    assert keywords.endswith("[secu- or [secu]")
    assert find_tests("deepclust/metrics.py", importers)[4] == "tests/test_metrics.py"
