"""Every feature that docs/features.md says we have is shown by tests that exist, and no feature is shown that it does not list."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tables() -> list[list[list[str]]]:
    """The page's two tables, each a list of rows of cells, without head and rule."""
    found: list[list[list[str]]] = []
    before = ""
    for line in (ROOT / "docs/features.md").read_text().splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        before = line
    return [table[2:] for table in found]


COMPARED, SHOWN = tables()
TESTS = {feature: re.findall(r"`(\S+)`", tests) for feature, tests in SHOWN}


@cache
def functions(file: str) -> set[str]:
    """Names of the test functions in a file of tests/."""
    body = ast.parse((ROOT / "tests" / file).read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_table_is_whole() -> None:
    assert len(COMPARED) > 20
    assert len({row[0] for row in COMPARED}) == len(COMPARED)
    for row in COMPARED:
        assert len(row) == 8, row[0]
        assert row[1] in ("yes", "partly", "no"), row  # what we have, we know
        assert set(row[2:]) <= {"yes", "partly", "no", "layer", "?"}, row


def test_what_we_say_we_have_is_what_is_shown() -> None:
    assert [row[0] for row in COMPARED if row[1] != "no"] == [row[0] for row in SHOWN]


@pytest.mark.parametrize("feature", TESTS)
def test_tests_named_exist(feature: str) -> None:
    assert TESTS[feature]
    for test in TESTS[feature]:
        file, name = test.split("::")
        assert name.startswith("test_")
        assert name in functions(file), f"{feature}: {test} does not exist"


def test_readme_says_the_same() -> None:
    known = set((ROOT / "docs/features.md").read_text().splitlines())
    text = (ROOT / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and line.count("|") == 9]
    assert len(rows) > 10
    assert set(rows) <= known
