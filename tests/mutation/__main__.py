"""Run the mutants of the files that hold the mathematics.

    pip install -e ".[tests,mutation]"
    python -m tests.mutation                # every file, goes on where it stopped
    python -m tests.mutation scans targets  # some files
    python -m tests.mutation --minutes 4    # at most so long
    python -m tests.mutation --count        # how many mutants there are and how many are left
    python -m tests.mutation --report       # rewrites tests/mutation/README.md

What is found is kept in ``.mutation/``, one line for each mutant, by the text of the change: after an
edit only what is new runs. A mutant is *killed* if a test fails or runs out of time, and *broken*, and
not counted, if the package cannot be imported. Every mutant gets a process of its own, forked from one
that has imported torch already.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.museum.__main__ import copy_of_the_repository
from tests.mutation.explained import EXPLAINED
from tests.mutation.mutants import Mutant, mutants_of


ROOT = Path(__file__).parents[2]
SESSION = ROOT / ".mutation"
TABLE = Path(__file__).with_name("README.md")

_FUZZED = "test_fuzz.py::test_what_the_fuzz_found_is_refused_clearly"
_AS_ON_A_GPU = "test_triton_softmax.py::test_schedules_take_the_route_of_a_gpu"
_SHARDED = "test_transforms.py::test_the_argument_that_is_sharded_is_named"
# Which tests look at which file, the quickest and closest first.
TESTS: dict[str, tuple[str, ...]] = {
    "_dtypes": ("test_cross_entropy.py", "test_linear_cross_entropy.py"),
    "targets": ("test_targets.py", "test_cross_entropy.py", _FUZZED),
    "documents": ("test_targets.py", "test_scores.py", "test_devices.py", "test_unchecked.py"),
    "cross_entropy": (
        "test_cross_entropy.py", "test_scores.py", "test_loss.py", "test_devices.py", _SHARDED,
    ),
    "scans": ("test_scores.py", "test_critic.py", "test_devices.py"),
    "scopes": ("test_normalize.py", "test_weights.py", "test_distributed.py"),
    "selection": ("test_weights.py", "test_distributed.py"),
    "scores": ("test_scores.py", "test_operators.py", "test_weights.py", "test_devices.py"),
    "row_local": ("test_row_local.py",),
    "normalize": (
        "test_normalize.py", "test_weights.py", "test_devices.py", "test_distributed.py",
        "test_fuzz.py::test_an_upper_bound_beyond_the_dtype_bounds_nothing",
    ),
    "whitening": ("test_weights.py", "test_devices.py", "test_distributed.py"),
    "weights": (
        "test_weights.py", "test_devices.py", "test_unchecked.py", "test_guesses.py", "test_distributed.py",
    ),
    "methods": ("test_weights.py", "test_guesses.py", "test_devices.py", "test_distributed.py"),
    "guesses": ("test_guesses.py", "test_loss.py", "test_distributed.py", "test_devices.py"),
    "combine": ("test_weights.py", "test_devices.py", "test_distributed.py"),
    "controls": ("test_controls.py", "test_devices.py"),
    "critic": ("test_critic.py", "test_devices.py"),
    "statistics": ("test_statistics.py", "test_devices.py"),
    "denominators": (
        "test_denominators.py", "test_loss.py", "test_critic.py", "test_devices.py",
        "test_fuzz.py::test_what_the_fuzz_found_is_refused_clearly",
    ),
    "loss": (
        "test_slabs.py", "test_loss.py", "test_loss_autograd.py", "test_operators.py", "test_row_local.py",
        "test_guesses.py", "test_devices.py",
    ),
    "problem": ("test_problem.py", "test_linear_cross_entropy.py", "test_loss_autograd.py"),
    "products": (
        "test_products.py", "test_linear_cross_entropy.py", "test_loss_autograd.py", "test_row_local.py",
        "test_guesses.py",
    ),
    "target_rows": ("test_target_rows.py", "test_slabs.py", "test_unchecked.py"),
    "slab_softmax": (
        "test_slab_softmax.py", "test_slabs.py", "test_linear_cross_entropy.py", "test_row_local.py",
        "test_loss.py", "test_loss_autograd.py", "test_unchecked.py", "test_precision.py", _AS_ON_A_GPU,
    ),
    "slab_layout": ("test_problem.py", "test_slabs.py", "test_linear_cross_entropy.py"),
    "schedule": (
        "test_problem.py", "test_guesses.py", "test_slabs.py", "test_loss.py", "test_loss_autograd.py",
        _AS_ON_A_GPU,
    ),
    "slab_columns": (
        "test_problem.py", "test_slabs.py", "test_guesses.py", "test_linear_cross_entropy.py",
        "test_row_local.py", "test_loss.py", "test_loss_autograd.py", "test_operators.py",
        "test_precision.py",
    ),
    "slab_rows": (
        "test_problem.py", "test_slabs.py", "test_guesses.py", "test_linear_cross_entropy.py",
        "test_row_local.py", "test_loss.py", "test_loss_autograd.py", "test_operators.py",
        "test_precision.py",
    ),
    "operators": (
        "test_operators.py", "test_guesses.py", "test_linear_cross_entropy.py", "test_loss_autograd.py",
        "test_row_local.py", "test_loss.py", "test_slabs.py", "test_transforms.py",
        "test_architecture.py",
    ),
    "linear_cross_entropy": (
        "test_slabs.py", "test_linear_cross_entropy.py", "test_guesses.py", "test_loss.py",
        "test_row_local.py", "test_devices.py", _SHARDED,
    ),
}  # fmt: skip


def run_tests(folder: Path, tests: Sequence[str], limit: float = 300) -> tuple[str, str]:
    """Run tests in a fork of this process: the outcome, and the first test that failed."""
    said = folder / "outcome"
    said.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _in_the_child(folder, tests, said)
    last, spent = time.monotonic(), 0.0
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        # A run that was suspended is not out of time.
        now = time.monotonic()
        last, spent = now, spent + min(now - last, 1.0)
        if spent > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout", ""
        time.sleep(0.02)
    if not said.exists():
        return "killed", "the process died"
    outcome, by = json.loads(said.read_text(encoding="utf-8"))
    return outcome, by


def _in_the_child(folder: Path, tests: Sequence[str], said: Path) -> None:
    import pytest

    class Watch:
        """Notes the first test that fails."""

        by = ""

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed and not self.by:
                self.by = report.nodeid

    watch = Watch()
    os.setpgid(0, 0)
    os.chdir(folder)
    # Of a mutant no byte code is kept: the next may have the same size and second.
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("wmtp", "tests")]:
        del sys.modules[name]
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        import wmtp

        assert Path(wmtp.__file__).is_relative_to(folder)
    except Exception as error:
        said.write_text(json.dumps(["broken", repr(error)[:100]]), encoding="utf-8")
        os._exit(0)
    options = ["-x", "-q", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist"]
    status = pytest.main([*options, *(f"tests/{test}" for test in tests)], plugins=[watch])
    names = {0: "survived", 1: "killed"}
    outcome = names.get(int(status), "killed" if watch.by else "broken")
    said.write_text(json.dumps([outcome, watch.by.split("[")[0]]), encoding="utf-8")
    os._exit(0)


def known(name: str) -> dict[str, dict[str, Any]]:
    """What earlier runs found, by the mutants' keys."""
    path = SESSION / f"{name}.jsonl"
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {record["key"]: record for record in map(json.loads, lines)}


def mutants(name: str) -> list[Mutant]:
    file = ROOT / "wmtp" / f"{name}.py"
    return list(mutants_of(name, file.read_text(encoding="utf-8")))


def run_file(name: str, folder: Path, end: float, again: bool) -> bool:
    """Run what is not known yet of a file; false if the time is up."""
    found = known(name)
    file = folder / "wmtp" / f"{name}.py"
    healthy = file.read_text(encoding="utf-8")
    left = [mutant for mutant in mutants(name) if _is_left(name, mutant, found, again)]
    if not left:
        return True
    killers = Counter(record["by"] for record in found.values() if _exists(record["by"]))
    start = time.monotonic()
    outcome, by = run_tests(folder, TESTS[name])
    limit = 10 + 4 * (time.monotonic() - start)
    if outcome != "survived":
        raise SystemExit(f"{name}: the tests fail without any mutant: {outcome} {by}")
    SESSION.mkdir(exist_ok=True)
    for compiled in (folder / "wmtp" / "__pycache__").glob(f"{name}.*.pyc"):
        compiled.unlink()
    try:
        for mutant in left:
            if time.monotonic() > end:
                return False
            file.write_text(mutant.source, encoding="utf-8")
            start = time.monotonic()
            # What has killed most runs first.
            first = [test.removeprefix("tests/") for test, _ in killers.most_common(10)]
            outcome, by = run_tests(folder, [*first, *TESTS[name]], limit)
            if _exists(by):
                killers[by] += 1
            record = mutant._asdict() | {"outcome": outcome, "by": by}
            del record["source"]
            record["seconds"] = round(time.monotonic() - start, 1)
            with (SESSION / f"{name}.jsonl").open("a", encoding="utf-8") as session:
                session.write(json.dumps(record, ensure_ascii=False) + "\n")
            if outcome == "survived":
                line = f"{name}.py:{mutant.line}: {mutant.before}  ->  {mutant.after}"
                print(f"survived: {line}", flush=True)
    finally:
        file.write_text(healthy, encoding="utf-8")
    return True


def _is_left(name: str, mutant: Mutant, found: dict[str, dict[str, Any]], again: bool) -> bool:
    """Whether it has not run yet or, `again`, has survived and nobody has said why."""
    record = found.get(mutant.key)
    return not record or (
        again and record["outcome"] == "survived" and not explanation(name, mutant)
    )


def _exists(test: str) -> bool:
    """Whether there is still such a test."""
    file, _, function = test.partition("::")
    path = ROOT / file
    return bool(function) and path.exists() and f"def {function}(" in path.read_text("utf-8")


def counts(name: str) -> Counter[str]:
    """How many mutants of a file as it is now have which outcome."""
    found = known(name)
    tally: Counter[str] = Counter()
    for mutant in mutants(name):
        record = found.get(mutant.key)
        outcome = record["outcome"] if record else "left"
        tally["equivalent" if outcome == "survived" and explanation(name, mutant) else outcome] += 1
    return tally


def explanation(name: str, mutant: Mutant) -> str | None:
    """Why a survivor is no gap, if somebody has said so."""
    return EXPLAINED.get((name, mutant.before, mutant.after))


def unfounded() -> list[tuple[str, str, str]]:
    """Explanations of what is no mutant any more."""
    changes = {(name, mutant.before, mutant.after) for name in TESTS for mutant in mutants(name)}
    return sorted(EXPLAINED.keys() - changes)


def score(tally: Counter[str]) -> float:
    """Percent of the mutants that tests can tell from the code and do."""
    killed = tally["killed"] + tally["timeout"]
    return 100 * killed / max(1, killed + tally["survived"])


def report() -> str:
    """The page of results."""
    whole: Counter[str] = Counter()
    rows, survivors, explained = [], [], []
    for name in TESTS:
        if not known(name):
            continue
        tally = counts(name)
        whole += tally
        rows.append(_row(f"`{name}.py`", tally))
        found = known(name)
        for mutant in mutants(name):
            if found.get(mutant.key, {}).get("outcome") == "survived":
                why = explanation(name, mutant)
                line = f"* `{name}.py`: `{mutant.before}` → `{mutant.after}`"
                (explained if why else survivors).append(f"{line}  \n  {why}" if why else line)
    rows.append(_row("all", whole))
    header = (
        "| file | mutants | killed | timeout | equivalent | survived | not run | score |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|\n"
    )
    return (
        "# Mutation run\n\n"
        "Mechanical mutants of the files that hold the mathematics, made with mutmut's operators, by\n"
        "`python -m tests.mutation`, which also says what is not mutated. The score is killed and timed\n"
        "out over these and survived; mutants that do not import are left out, and so are those that no\n"
        "test here could or should tell from the code: equivalent ones, and some that change time or\n"
        "memory alone or matter on a GPU only. Each is listed below with the reason.\n\n"
        + header
        + "\n".join(rows)
        + "\n\n## Survivors\n\n"
        + ("\n".join(survivors) or "None.")
        + "\n\n## Equivalent mutants, and others that are left out\n\n"
        + ("\n".join(explained) or "None.")
        + "\n"
    )


def _row(title: str, tally: Counter[str]) -> str:
    run = tally.total() - tally["broken"]
    cells = [run, *(tally[x] for x in ("killed", "timeout", "equivalent", "survived", "left"))]
    return f"| {title} | " + " | ".join(map(str, cells)) + f" | {score(tally):.1f} % |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("files", nargs="*", metavar="file", help=f"of {', '.join(TESTS)}")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--again", action="store_true", help="run unexplained survivors once more")
    parser.add_argument("--count", action="store_true", help="only count")
    parser.add_argument("--report", action="store_true", help="only write the page of results")
    options = parser.parse_args()
    if unknown := set(options.files) - set(TESTS):
        parser.error(f"no such file: {', '.join(sorted(unknown))}")
    names = options.files or list(TESTS)
    if options.report:
        if stale := unfounded():
            raise SystemExit(f"explained.py explains what is no mutant: {stale}")
        TABLE.write_text(report(), encoding="utf-8")
        return 0
    if options.count:
        for name in names:
            print(f"{name}: {dict(counts(name))}")
        return 0

    # Before torch is imported: a fork must find no threads but its own.
    os.environ |= {"OMP_NUM_THREADS": "1", "HYPOTHESIS_PROFILE": "mutation"}
    os.environ["TRITON_INTERPRET"] = "1"
    _import_once()
    end = time.monotonic() + 60 * options.minutes
    with copy_of_the_repository() as folder:
        compileall.compile_dir(str(folder), quiet=2)
        os.environ["PYTHONPATH"] = str(folder)
        for name in names:
            if not run_file(name, folder, end, options.again):
                print("time is up; the same command goes on from here")
                break
    for name in names:
        tally = counts(name)
        print(f"{name}: {score(tally):.1f} % {dict(tally)}")
    return 0


def _import_once() -> None:
    """What every fork would import for itself, without the package and its tests."""
    import beartype
    import einops
    import hypothesis
    import jaxtyping
    import torch
    import torch._dynamo
    import torch.distributed

    assert all((beartype, einops, hypothesis, jaxtyping))
    torch.set_num_threads(1)


if __name__ == "__main__":
    raise SystemExit(main())
