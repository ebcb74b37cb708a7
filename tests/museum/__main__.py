"""Plant every bug of the museum, run the tests, say which one noticed.

    python -m tests.museum                  # all bugs, rewrites tests/museum/README.md
    python -m tests.museum --only NAME ...  # some of them; the other rows stay as they are
    python -m tests.museum --jobs 2

Each bug gets a copy of the repository in a temporary folder. The tests named with it run first; if
they pass, the whole suite does. The exit status is 1 if a bug survives.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.museum.bugs import BUGS, Bug


ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("README.md")
PARTS = ("wmtp", "tests", "examples", "benchmarks", "README.md", "CHANGELOG.md", "pyproject.toml")
# In a mutated copy the museum's own test fails for a reason that has nothing to do with the bug.
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "museum", "mutation", "test_museum.py", "runs")
_LIMIT_TARGETED, _LIMIT_SUITE = 300, 1200
_HEADER = """\
# The field-bug museum

Bugs that users of other projects have met, each planted in our own code as a small mutant. The suite
has to notice every one of them; `python -m tests.museum` plants them again and rewrites this table.
The bugs themselves, with the text before and after, are in [`bugs.py`](bugs.py). The tests named for
a bug run first, and "caught by" is the first test that fails; others would notice as well.

| bug | what goes wrong | seen in | where | caught by |
|---|---|---|---|---|
"""


class Verdict(NamedTuple):
    """Whether a run of the tests noticed a bug, by which test, or why it says nothing."""

    caught: bool
    by: str
    seconds: float = 0.0


def verdict(status: int, output: str) -> Verdict:
    """Read pytest's exit status and its short summary (``-rfE``).

    Only a test that ran and failed counts: a file that cannot be collected notices any typing error.
    """
    found = re.search(r"^(?:FAILED|ERROR) (tests/\S+?::\S+|wmtp/\S+?::\S+)", output, re.MULTILINE)
    if status == 1 and found:
        return Verdict(True, found[1].split("[")[0])
    if status == 0:
        return Verdict(False, "no test fails")
    return Verdict(False, f"pytest ends with status {status} and no failing test")


def plant(bug: Bug, folder: Path) -> None:
    """Write the mutant; refuse an old text that is not there exactly once."""
    for change in bug.changes:
        path = folder / change.file
        source = path.read_text(encoding="utf-8")
        if source.count(change.old) != 1:
            raise ValueError(f"{bug.name}: found {source.count(change.old)} times: {change.old!r}")
        path.write_text(source.replace(change.old, change.new), encoding="utf-8")


@contextmanager
def copy_of_the_repository() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="museum-") as name:
        folder = Path(name)
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, folder / part, ignore=_LEFT_OUT)
            else:
                shutil.copy(source, folder / part)
        yield folder


def run(folder: Path, arguments: Sequence[str], limit: float) -> Verdict:
    """Run pytest in a copy, up to its first failure."""
    environment = {"HYPOTHESIS_PROFILE": "ci", "OMP_NUM_THREADS": "1", **os.environ}
    environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-rfE"]
    command += ["-p", "no:cacheprovider", "-p", "no:randomly", *arguments]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return Verdict(False, f"no end after {limit:.0f} s", time.monotonic() - start)
    found = verdict(done.returncode, done.stdout)
    return found._replace(seconds=time.monotonic() - start)


def hunt(bug: Bug) -> Verdict:
    """Plant one bug and look for the first test that notices."""
    with copy_of_the_repository() as folder:
        plant(bug, folder)
        imported = subprocess.run(
            [sys.executable, "-c", "import wmtp; print(wmtp.__file__)"],
            cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True,
        )  # fmt: skip
        if not imported.stdout.startswith(str(folder)):
            return Verdict(False, f"the mutant cannot be imported: {imported.stderr[-200:]}")
        found = run(folder, bug.tests, _LIMIT_TARGETED)
        return found if found.caught else run(folder, [], _LIMIT_SUITE)


def without_a_bug(tests: Sequence[str]) -> Verdict:
    """Run tests on a copy as it is."""
    with copy_of_the_repository() as folder:
        return run(folder, tests, _LIMIT_SUITE)


def rows_of(table: str) -> dict[str, str]:
    """Which test caught which bug, as the table has it."""
    rows = (
        line.strip("| \n").split(" | ") for line in table.splitlines() if line.startswith("| `")
    )
    return {cells[0].strip("`"): cells[-1].strip("`") for cells in rows}


def table_of(caught: dict[str, str]) -> str:
    """The page, with a row for each bug in the order of the list."""
    lines = [
        f"| `{bug.name}` | {bug.story} | {bug.seen} | `{bug.changes[0].file}` "
        f"| `{caught.get(bug.name, 'not run yet')}` |"
        for bug in BUGS
    ]
    return _HEADER + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.museum")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the bugs")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2))
    options = parser.parse_args()
    names = options.only or [bug.name for bug in BUGS]
    chosen = [bug for bug in BUGS if bug.name in names]
    if unknown := set(names) - {bug.name for bug in chosen}:
        parser.error(f"no such bug: {', '.join(sorted(unknown))}")

    caught = rows_of(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    survivors: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        # A test that fails without a bug would catch them all.
        first = sorted({test for bug in chosen for test in bug.tests})
        healthy = pool.submit(without_a_bug, first)
        for bug, found in zip(chosen, pool.map(hunt, chosen), strict=True):
            word = "caught by" if found.caught else "NOT CAUGHT:"
            print(f"{bug.name}: {word} {found.by} ({found.seconds:.0f} s)", flush=True)
            caught[bug.name] = found.by if found.caught else f"NOT CAUGHT: {found.by}"
            if not found.caught:
                survivors.append(bug.name)
            TABLE.write_text(table_of(caught), encoding="utf-8")
        if healthy.result().by != "no test fails":
            print(f"this says nothing: the tests fail without any bug: {healthy.result().by}")
            return 2
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
