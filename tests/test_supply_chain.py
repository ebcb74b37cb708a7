"""Where code could come from: packages that are installed, files that are opened."""

# pyright: reportMissingImports=false
# `lab` is found because the examples' folder is put on the path below, as running train.py does.

from __future__ import annotations

import ast
import importlib.metadata
import io
import pickle
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import load_script


ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

from lab.checkpoint import read_tensors, write_tensors  # noqa: E402
from lab.config import load_config  # noqa: E402
from lab.critic import place as critic_place  # noqa: E402
from lab.errors import LabError  # noqa: E402
from lab.experiment import prepare_text  # noqa: E402
from lab.pairs import functions, make_pairs  # noqa: E402
from lab.reference import place as reference_place  # noqa: E402


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED = {
    "tests": ROOT / "tests/requirements.txt",
    "benchmarks": ROOT / "benchmarks/requirements.txt",
}
EXTRAS = pytest.mark.parametrize("extra", sorted(LOCKED))


# ---------------------------------------------------------------- what is installed


def wanted(extra: str) -> Iterator[Requirement]:
    """The requirements of an extra and of the package itself; `wmtp[other]` is looked into."""
    for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"][extra]]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                yield from wanted(other)
        elif requirement.marker is None or requirement.marker.evaluate({"sys_platform": "linux"}):
            yield requirement


def locked(extra: str) -> dict[str, tuple[str, list[str]]]:
    """Name to version and hashes, of a file in which nothing else may stand."""
    text = re.sub(r"(?m)^#.*\n", "", LOCKED[extra].read_text()).replace("\\\n", " ")
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        entry = re.fullmatch(r"([\w.-]+)==(\S+)((?:\s+--hash=sha256:[0-9a-f]{64})+)", line)
        assert entry is not None, f"not a pinned and hashed requirement: {line[:80]}"
        name, version, hashes = entry.groups()
        assert canonicalize_name(name) not in found, f"{name} stands there twice"
        found[canonicalize_name(name)] = version, hashes.split()
    return found


@EXTRAS
def test_every_requirement_is_pinned_and_hashed(extra: str) -> None:
    found = locked(extra)
    for requirement in wanted(extra):
        name = canonicalize_name(requirement.name)
        assert name in found, f"{requirement} is not pinned"
        assert requirement.specifier.contains(found[name][0]), f"{name} {found[name][0]}"
        assert len(found[name][1]) == len(set(found[name][1])) >= 1


@EXTRAS
def test_the_pinned_versions_need_nothing_that_is_not_pinned(extra: str) -> None:
    """As far as what is installed here can tell: the same version asks for the same packages."""
    found = locked(extra)
    checked = 0
    for name, (version, _) in found.items():
        try:
            here = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if here.version != version:
            continue
        checked += 1
        for text in here.requires or []:
            needed = Requirement(text)
            place = {"sys_platform": "linux", "platform_system": "Linux", "extra": ""}
            if needed.marker is None or needed.marker.evaluate(place):
                assert canonicalize_name(needed.name) in found, f"{name} needs {needed}"
                pinned = found[canonicalize_name(needed.name)][0]
                assert needed.specifier.contains(pinned, prereleases=True), f"{name}: {needed}"
    if not checked:
        pytest.skip("nothing of what is installed here has the pinned version")


@EXTRAS
def test_no_requirement_comes_from_an_address(extra: str) -> None:
    text = LOCKED[extra].read_text()
    assert not re.search(r"://|--(extra-)?index-url|--find-links|--trusted-host", text)


def test_both_files_pin_the_same_versions() -> None:
    one, other = locked("tests"), locked("benchmarks")
    shared = one.keys() & other.keys()
    assert {name: one[name] for name in shared} == {name: other[name] for name in shared}


# ---------------------------------------------------------------- what is opened

SOURCES = [
    path.relative_to(ROOT).as_posix()
    for folder in ("wmtp", "examples", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
UNPICKLERS = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN = {
    "eval", "exec", "builtins.eval", "builtins.exec", "yaml.load", "yaml.full_load",
    "yaml.unsafe_load", "yaml.load_all", "pandas.read_pickle", "torch.jit.load", "torch.hub.load",
    "torch.package.PackageImporter", "os.system", "runpy.run_path",
}  # fmt: skip


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """`np.load` as `numpy.load`, whatever the import called it; empty for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        left = dotted(node.value, names)
        return f"{left}.{node.attr}" if left else ""
    return ""


def imported(tree: ast.AST) -> dict[str, str]:
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name if alias.asname else alias.name.partition(".")[0]
                names[alias.asname or top] = top
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def unsafe(source: str) -> list[str]:
    """Calls that could execute what a file or a string holds."""
    tree = ast.parse(source)
    names = imported(tree)
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = dotted(node.func, names)
        given = {key.arg: key.value for key in node.keywords}

        def says(name: str, value: Any, given: dict[str | None, ast.expr] = given) -> bool:
            held = given.get(name)
            return isinstance(held, ast.Constant) and held.value is value

        top, _, last = called.rpartition(".")
        if called in FORBIDDEN or (
            last == "load" and top == "torch" and not says("weights_only", True)
        ):
            found.append(f"line {node.lineno}: {called}")
        elif top == "numpy" and last == "load" and "allow_pickle" in given:
            if not says("allow_pickle", False):
                found.append(f"line {node.lineno}: {called}(allow_pickle)")
        elif called.partition(".")[0] in UNPICKLERS and last in (
            "load",
            "loads",
            "open",
            "Unpickler",
        ):
            inner = node.args[0] if node.args else None
            own = isinstance(inner, ast.Call) and dotted(inner.func, names) == f"{top}.dumps"
            if not own:  # a round trip through memory opens nothing
                found.append(f"line {node.lineno}: {called}")
        elif called.startswith("subprocess.") and says("shell", True):
            found.append(f"line {node.lineno}: {called}(shell=True)")
    return found


@pytest.mark.parametrize("path", SOURCES)
def test_no_source_opens_a_file_that_could_execute(path: str) -> None:
    assert unsafe((ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "import torch as t\nt.load('x', weights_only=False)",
        "from torch import load as get\nget('x', weights_only=flag)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import pickle\npickle.load(open('x'))",
        "from pickle import loads\nloads(data)",
        "import joblib\njoblib.load('x')",
        "eval('1')",
        "import builtins\nbuiltins.exec('1')",
        "import yaml\nyaml.load(text)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert len(unsafe(source)) == 1


def test_the_search_leaves_safe_calls_alone() -> None:
    assert unsafe("import torch\ntorch.load('x', weights_only=True)\nmodel.eval()") == []
    assert unsafe("import pickle\npickle.loads(pickle.dumps(1))") == []


class Bomb:
    """Unpickled, it touches a file; the function runs before anything can be checked."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Bomb(mark))


def torch_saved(mark: Path) -> bytes:
    file = io.BytesIO()
    torch.save(Bomb(mark), file)
    return file.getvalue()


def python(mark: Path) -> bytes:
    return f"__import__('pathlib').Path({str(mark)!r}).touch()\n".encode()


BOMBS = pytest.mark.parametrize("bomb", [pickled, torch_saved, python])


def test_the_bombs_are_live(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()
    assert b"touch" in torch_saved(mark)


TRAIN = load_script(EXAMPLES / "train.py")
QUIET = ["tracking.mlflow=false", "tracking.plots=false", "train.threads=1", "compare.arms=[]"]
QUIET += ["train.steps=4", "train.checkpoint_every=1", "rho1.reference_steps=1", "critic.steps=1"]


@pytest.fixture(autouse=True)
def _leave_torch_alone() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def words(runs: Path, *extra: str, changes: tuple[str, ...] = ()) -> list[str]:
    sets = [word for change in (*QUIET, *changes) for word in ("--set", change)]
    return ["--config", str(EXAMPLES / "tiny.toml"), "--runs", str(runs), *sets, *extra]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that were stopped, with every kind of file that a later one opens."""
    folder = tmp_path_factory.mktemp("runs")
    for name, algo in (("rho1", "rho1-wmtp"), ("critic", "critic-wmtp")):
        changes = (f"train.name={name}", f"train.algo={algo}")
        assert TRAIN.main(words(folder, "--stop-after", "1", changes=changes)) in (0, 130)
        assert TRAIN.main(words(folder, "--stop-after", "2", "--resume", changes=changes)) == 130
    return folder


def opened(runs: Path) -> dict[str, Path]:
    config = load_config(EXAMPLES / "tiny.toml", [*QUIET, "train.name=rho1"])
    text = prepare_text(config)
    return {
        "checkpoint": runs / "rho1" / "rho1-wmtp" / "checkpoint.safetensors",
        "reference": reference_place(config, text.data, runs),
        "critic": critic_place(config, text.data, runs),
        "description": runs / "rho1" / "run.json",
        "results": runs / "rho1" / "rho1-wmtp" / "results.json",
        "history": runs / "rho1" / "rho1-wmtp" / "metrics.jsonl",
    }


@BOMBS
@pytest.mark.parametrize(
    "kind",
    [
        "checkpoint",
        "reference",
        "critic",
        "description",
        "results",
        "history",
    ],
)
def test_a_file_from_elsewhere_executes_nothing(
    kind: str, bomb: Callable[[Path], bytes], runs: Path, tmp_path: Path, capsys: Any
) -> None:
    path, mark = opened(runs)[kind], tmp_path / "mark"
    name = "critic" if kind == "critic" else "rho1"
    before = path.read_bytes() if path.exists() else None
    assert before is not None or kind == "results"
    path.write_bytes(bomb(mark))
    capsys.readouterr()
    try:
        changes = (f"train.name={name}", f"train.algo={name}-wmtp")
        code = TRAIN.main(words(runs, "--resume", changes=changes))
        assert not mark.exists()
        error = capsys.readouterr().err
        assert code == 2, error
        assert error.count("\n") == 1, error
        assert str(path) in error
    finally:
        path.unlink()
        if before is not None:
            path.write_bytes(before)


@BOMBS
def test_a_signal_or_a_configuration_that_is_given_executes_nothing(
    bomb: Callable[[Path], bytes], tmp_path: Path, capsys: Any
) -> None:
    mark, path = tmp_path / "mark", tmp_path / "given"
    path.write_bytes(bomb(mark))
    given = (f"rho1.reference_nll={str(path)!r}",)
    for arguments in (words(tmp_path / "runs", changes=given), ["--config", str(path)]):
        assert TRAIN.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert str(path) in error
    assert not mark.exists()


@BOMBS
def test_a_corpus_from_elsewhere_is_read_and_never_run(
    bomb: Callable[[Path], bytes], tmp_path: Path
) -> None:
    mark, root = tmp_path / "mark", tmp_path / "corpus"
    root.mkdir()
    for index in range(200):
        body = b"\ndef f%d(x):\n    return x + %d\n" % (index, index)
        (root / f"m{index}.py").write_bytes(bomb(mark) + body)
    text = prepare_text(load_config(EXAMPLES / "tiny.toml", [f"corpus.root={str(root)!r}"]))
    assert all(text.documents.values())
    if bomb is python:  # the pairs compile it, and no more
        sources = functions(text.documents["reference"], 160)
        assert len(make_pairs(sources, 4, 161, seed=0)[0].tokens) == 4
    else:
        with pytest.raises(LabError, match="no function"):
            functions(text.documents["reference"], 160)
    assert not mark.exists()


def test_safetensors_is_what_the_examples_write(tmp_path: Path) -> None:
    """The first bytes are the length of a JSON header: no pickle begins so, and none is inside."""
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(3)}, {"step": 1})
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert raw[8:9] == b"{"
    assert 8 + length + 12 == len(raw)
    tensors, metadata = read_tensors(path, advice="")
    assert torch.equal(tensors["x"], torch.ones(3))
    assert metadata == {"step": 1}
