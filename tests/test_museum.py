"""The museum of field bugs fits the code as it is; `python -m tests.museum` runs it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.museum.__main__ import TABLE, plant, rows_of, table_of, verdict
from tests.museum.bugs import BUGS, Bug


ROOT = Path(__file__).parents[1]
NAMES = [bug.name for bug in BUGS]


def test_there_are_many_different_bugs() -> None:
    assert len(BUGS) >= 40
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("bug", BUGS, ids=NAMES)
def test_a_bug_can_still_be_planted(bug: Bug, tmp_path: Path) -> None:
    for file in {change.file for change in bug.changes}:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text((ROOT / file).read_text(encoding="utf-8"), encoding="utf-8")
    plant(bug, tmp_path)
    for file in {change.file for change in bug.changes}:
        trees = [ast.parse((root / file).read_text(encoding="utf-8")) for root in (ROOT, tmp_path)]
        healthy, planted = (ast.dump(tree) for tree in trees)
        assert healthy != planted
    assert bug.tests
    for test in bug.tests:
        file, *name = test.split("::")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert all(f"def {part}(" in source for part in name)


def test_an_old_text_that_is_gone_is_refused(tmp_path: Path) -> None:
    bug = BUGS[0]
    file = tmp_path / bug.changes[0].file
    file.parent.mkdir()
    for text in ("", 2 * bug.changes[0].old):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="times"):
            plant(bug, tmp_path)


def test_every_bug_is_in_the_table_with_a_test_that_exists() -> None:
    table = TABLE.read_text(encoding="utf-8")
    caught = rows_of(table)
    assert list(caught) == NAMES
    for test in caught.values():
        file, *name = test.split("::")
        source = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {name[-1]}(" in source or file.startswith("wmtp/")
    assert table_of(caught) == table, "stale: run python -m tests.museum"


@pytest.mark.parametrize(
    ("status", "output", "caught"),
    [
        (0, "3 passed", False),
        (1, "FAILED tests/test_a.py::test_b[x y] - assert 0", True),
        (1, "ERROR tests/test_a.py::test_b - RuntimeError: a fixture", True),
        (1, "1 error", False),
        (2, "ERROR tests/test_a.py - ImportError: cannot import name", False),
        (2, "ERROR tests/test_a.py::test_b - of another time", False),
        (3, "INTERNALERROR>", False),
        (4, "ERROR: file or directory not found", False),
        (5, "no tests ran", False),
    ],
)
def test_only_a_test_that_ran_and_failed_catches(status: int, output: str, caught: bool) -> None:
    assert verdict(status, f"...F\n{output}\n").caught is caught
