"""The examples: reproducible, resumable, and clear about what is wrong with what they were given."""

# pyright: reportMissingImports=false
# `lab` is found because the examples' folder is put on the path below, as running train.py does.

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import load_script


ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))

import lab.arm  # noqa: E402
import lab.training  # noqa: E402
from lab.batches import batch_rows, take  # noqa: E402
from lab.checkpoint import (  # noqa: E402
    load_checkpoint,
    read_tensors,
    save_checkpoint,
    write_tensors,
)
from lab.config import CorpusConfig, CorruptionConfig, from_dict, load_config  # noqa: E402
from lab.corpus import BOS, IGNORE, Document, load_splits, pack  # noqa: E402
from lab.corruption import corrupt  # noqa: E402
from lab.errors import LabError  # noqa: E402
from lab.experiment import prepare_text  # noqa: E402
from lab.pairs import compiles, functions, make_pairs  # noqa: E402
from lab.report import table  # noqa: E402
from lab.signals import corpus_identity, save_signal  # noqa: E402
from lab.tracking import Tracker  # noqa: E402
from lab.training import CHECKPOINT, Job, Schedule, Stop, fit  # noqa: E402
from lab.weighting import ALGOS  # noqa: E402


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
}
QUIET = ["tracking.mlflow=false", "tracking.plots=false", "train.threads=1", "compare.arms=[]"]
TINY = EXAMPLES / "tiny.toml"


TRAIN = load_script(EXAMPLES / "train.py")


@pytest.fixture(autouse=True)
def _leave_torch_alone():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def tiny():
    return load_config(TINY)


@pytest.fixture(scope="module")
def text(tiny):
    return prepare_text(tiny)


def arguments(runs, *extra, changes=()):
    words = [word for change in (*QUIET, *changes) for word in ("--set", change)]
    return ["--config", str(TINY), "--runs", str(runs), *words, *extra]


def launch(*words, **options):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=False, **options
    )


def snapshot(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---------------------------------------------------------------- the text


def test_no_file_and_no_content_is_in_two_splits(text):
    seen = [(d.name, d.data) for documents in text.documents.values() for d in documents]
    assert len({name for name, _ in seen}) == len(seen)
    untouched = [d.data for ds in load_splits(CorpusConfig()).values() for d in ds]
    assert len(set(untouched)) == len(untouched)


def test_a_file_keeps_its_split_when_others_come_and_go(tmp_path):
    for index in range(80):
        (tmp_path / f"m{index}.py").write_text(f"x = {index}\n")
    config = CorpusConfig(root=str(tmp_path))
    before = {d.name: split for split, ds in load_splits(config).items() for d in ds}
    for index in range(0, 80, 3):
        (tmp_path / f"m{index}.py").unlink()
    after = {d.name: split for split, ds in load_splits(config).items() for d in ds}
    assert after == {name: before[name] for name in after}


def test_only_training_files_are_corrupted_and_the_mask_says_where(tiny, text):
    clean = load_splits(tiny.corpus)
    for split, documents in text.documents.items():
        originals = {d.name: d.data for d in clean[split]}
        for document in documents:
            changed = [a != b for a, b in zip(document.data, originals[document.name], strict=True)]
            assert changed == document.corrupted.tolist()
            assert split == "train" or not any(changed)
    noisy = [d for d in text.documents["train"] if d.corrupted.any()]
    assert len(noisy) == round(tiny.corruption.share * len(text.documents["train"]))


@pytest.mark.parametrize("kind", ["random", "substitution"])
def test_corruption_keeps_layout_and_follows_the_rate(kind):
    data = bytes(range(32, 127)) * 40 + b"\n\t" * 100
    document = Document("a.py", data, torch.zeros(len(data), dtype=torch.bool))
    (noisy,) = corrupt([document], CorruptionConfig(share=1.0, rate=0.3, kind=kind), seed=3)
    printable = torch.tensor([32 <= byte < 127 for byte in data])
    assert not noisy.corrupted[~printable].any()
    assert 0.25 < noisy.corrupted[printable].float().mean() < 0.35
    pairs = {(a, b) for a, b in zip(data, noisy.data, strict=True) if a != b}
    assert (len({a for a, _ in pairs}) == len(pairs)) == (kind == "substitution")
    (again,) = corrupt([document], CorruptionConfig(share=1.0, rate=0.3, kind=kind), seed=3)
    assert again.data == noisy.data


def test_no_prediction_and_no_label_crosses_a_document():
    documents = [
        Document(f"{i}.py", bytes([i]) * n, torch.zeros(n, dtype=torch.bool))
        for i, n in enumerate([3, 1, 40, 7, 2, 19, 1, 1])
    ]
    packed = pack(documents, 16, seed=0)
    batch = take(packed, torch.arange(packed.rows), heads=4)
    found = 0
    for row, place, head in (batch.targets != IGNORE).nonzero().tolist():
        there = place + head + 1
        assert batch.segment_ids[row, place] == batch.segment_ids[row, there] >= 0
        assert batch.targets[row, place, head] == packed.tokens[row, there] != BOS
        found += 1
    assert found > 0
    text = packed.segment_ids >= 0
    assert int(text.sum()) == sum(len(d.data) + 1 for d in documents)
    assert bool((packed.labels[~text] == IGNORE).all())


def test_every_row_comes_once_per_pass():
    rows = torch.cat([batch_rows(10, 4, seed=5, step=step) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))


def test_another_process_draws_the_same_batches(tiny, text):
    code = (
        f"import sys, hashlib; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "from lab.batches import *; from lab.config import load_config\n"
        "from lab.experiment import prepare_text\n"
        f"data = prepare_text(load_config({str(TINY)!r})).data['train']\n"
        "tokens = [take(data, batch_rows(data.rows, 4, 1, k), 4).tokens for k in (0, 7, 400)]\n"
        "print(data.fingerprint(), hashlib.sha256(torch.cat(tokens).numpy().tobytes()).hexdigest())"
    )
    data = text.data["train"]
    tokens = [take(data, batch_rows(data.rows, 4, 1, k), 4).tokens for k in (0, 7, 400)]
    digest = hashlib.sha256(torch.cat(tokens).numpy().tobytes()).hexdigest()
    done = launch("-c", code)
    assert done.stdout.split() == [data.fingerprint(), digest], done.stderr


def test_one_side_of_every_pair_compiles(text):
    sources = functions(text.documents["reference"], 160)
    good, bad = make_pairs(sources, 30, 161, seed=2)
    for side, wanted in ((good, True), (bad, False)):
        for tokens, valid in zip(side.tokens, side.valid, strict=True):
            assert compiles(bytes(tokens[valid].tolist()).decode()) == wanted


# ---------------------------------------------------------------- running


@pytest.mark.parametrize("algo", ALGOS)
def test_every_algo_runs_by_configuration_alone(algo, runs, capsys):
    changes = ["train.steps=3", "rho1.reference_steps=3", "critic.steps=3"]
    name = f"all-{algo}"
    changes += [f"train.algo={algo}", f"train.name={name}", "train.log_every=1"]
    assert TRAIN.main(arguments(runs, changes=changes)) == 0
    result = json.loads((runs / name / "results.json").read_text())
    assert set(result) == {"config", "seed", "versions", "results"}
    assert {"python", "torch", "wmtp", "platform"} <= set(result["versions"])
    heads = 1 if algo == "baseline-ntp" else 4
    assert len(result["results"][algo]["test_head_loss"]) == heads
    logged = [
        json.loads(line) for line in (runs / name / algo / "metrics.jsonl").read_text().splitlines()
    ]
    wanted = {"loss", "weight_mean", "effective_sample_ratio", "nan_weights", "weight_p95"}
    assert wanted <= set(logged[0])
    assert ("rho1_usage_ratio" in logged[0]) == (algo in ALGOS[2:] and algo != "critic-wmtp")
    assert ("critic_delta_std" in logged[0]) == (algo in ("critic-wmtp", "combined-wmtp"))
    assert algo in capsys.readouterr().out


def test_stopping_and_resuming_changes_no_bit(runs):
    base = ["train.steps=9", "rho1.reference_steps=3", "train.algo=shuffled-control"]
    base += ["train.log_every=1", "train.checkpoint_every=2", "train.evaluate_every=4"]
    straight, parts = ([*base, f"train.name={name}"] for name in ("straight", "parts"))
    assert TRAIN.main(arguments(runs, changes=straight)) == 0
    assert TRAIN.main(arguments(runs, "--stop-after", "5", changes=parts)) == 130
    assert not (runs / "parts" / "results.json").exists()
    assert TRAIN.main(arguments(runs, "--resume", changes=parts)) == 0
    kept = []
    for name in ("straight", "parts"):
        folder = runs / name / "shuffled-control"
        tensors, metadata = read_tensors(folder / "checkpoint.safetensors", advice="")
        kept.append((tensors, metadata["step"], (folder / "metrics.jsonl").read_text()))
    (one, step, history), (other, other_step, other_history) = kept
    assert (step, history) == (other_step, other_history)
    assert one.keys() == other.keys()
    assert any(key.startswith("optimizer.") for key in one)
    assert all(torch.equal(one[key], other[key]) for key in one)


KILLED = ["train.steps=4", "train.algo=baseline-mtp", "train.log_every=1"]


class Killed(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


def killed(words, monkeypatch, module, name, after=1, made=False):
    """Run up to the `after`-th call of `module.name`; whether that one still is `made`."""
    calls, whole = [], getattr(module, name)

    def kill(*given):
        calls.append(name)
        if made or len(calls) < after:
            whole(*given)
        if len(calls) == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, name, kill)
        with pytest.raises(Killed):
            TRAIN.main(words)


def test_a_kill_while_results_are_written_changes_no_history(tmp_path, monkeypatch):
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert TRAIN.main(arguments(straight, changes=KILLED)) == 0
    killed(arguments(parts, changes=KILLED), monkeypatch, lab.arm, "write_json")
    assert not (parts / "tiny" / "baseline-mtp" / "results.json").exists()
    log = Path("tiny", "baseline-mtp", "metrics.jsonl")
    assert "test_head0_loss" in (parts / log).read_text()
    assert TRAIN.main(arguments(parts, "--resume", changes=KILLED)) == 0
    assert (parts / log).read_text() == (straight / log).read_text()


def test_a_kill_while_the_history_is_rewound_loses_none_of_it(tmp_path, monkeypatch):
    changes = [*KILLED, "train.steps=6"]
    assert TRAIN.main(arguments(tmp_path, "--stop-after", "3", changes=changes)) == 130
    log = tmp_path / "tiny" / "baseline-mtp" / "metrics.jsonl"
    before = log.read_bytes()
    assert before.count(b"\n") == 3
    log.write_bytes(before + b'{"step": 4, "lo')  # a kill while a line was written
    words, whole = arguments(tmp_path, "--resume", changes=changes), Path.write_text

    def half(path, text, **options):
        whole(path, text[: len(text) // 2], **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(Killed):
            TRAIN.main(words)
    assert log.read_bytes().startswith(before)
    assert TRAIN.main([*words, "--stop-after", "4"]) == 130
    assert log.read_bytes().startswith(before)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    changes = [*KILLED, "train.algo=rho1-wmtp", "rho1.reference_steps=4"]
    words = arguments(tmp_path, "--stop-after", "2", changes=changes)
    assert TRAIN.main(words) == 130
    reference = next(tmp_path.glob("reference-*"))
    (tmp_path / "tiny" / "rho1-wmtp").mkdir()
    left, kept = [], []
    for folder, name in (
        (tmp_path / "tiny", "results.json"),
        (tmp_path / "tiny" / "rho1-wmtp", "results.json"),
        (reference, "nll.safetensors"),
        (reference, "metrics.jsonl"),
    ):
        left += [folder / f".{name}.{pid}.part" for pid in (dead.pid, os.getpid())]
        kept += [folder / f".{name}.{os.getppid()}.part", folder / f".{name}.mine.part"]
    for path in left + kept:
        path.write_text("half")
    assert TRAIN.main(arguments(tmp_path, "--resume", changes=changes)) == 0
    assert sorted(tmp_path.rglob(".*")) == sorted(kept)


@pytest.mark.filterwarnings("ignore")  # MLflow's own use of SQLAlchemy
def test_kills_leave_every_metric_in_the_store_once(tmp_path, monkeypatch):
    changes = [*KILLED, "tracking.mlflow=true", "train.checkpoint_every=1"]
    words, resume = arguments(tmp_path, changes=changes), ()
    for module, name, after, made in (
        (lab.training, "save_checkpoint", 2, True),
        (lab.training, "save_checkpoint", 1, False),
        (lab.arm, "write_json", 1, False),
        (lab.arm, "write_json", 1, True),
    ):
        killed([*words, *resume], monkeypatch, module, name, after, made)
        resume = ("--resume",)
    assert TRAIN.main([*words, *resume]) == 0
    folder = tmp_path / "tiny"
    lines = (folder / "baseline-mtp" / "metrics.jsonl").read_text().splitlines()
    wanted = [
        (name, entry["step"], value)
        for entry in map(json.loads, lines)
        for name, value in entry.items()
        if name != "step"
    ]
    assert {"test_head0_loss", "loss"} <= {name for name, _, _ in wanted}
    with sqlite3.connect(folder / "mlflow.db") as store:
        found = store.execute("select key, step, value from metrics").fetchall()
    assert sorted(found) == sorted(wanted)


REFERENCE = ["train.steps=4", "rho1.reference_steps=4", "train.log_every=1"]


def test_a_stopped_reference_goes_on_and_ends_the_same(tmp_path):
    """It has one head, so `heads.inner` is empty and the optimiser knows nothing about it."""
    kept = []
    for name in ("straight", "parts"):
        runs = tmp_path / name
        if name == "parts":
            assert TRAIN.main(arguments(runs, "--stop-after", "2", changes=REFERENCE)) == 130
            assert not list(runs.glob("reference-*/nll.safetensors"))
        resume = ["--resume"] if name == "parts" else []
        assert TRAIN.main(arguments(runs, *resume, changes=REFERENCE)) == 0
        tensors = {
            str(path.relative_to(runs)): read_tensors(path, advice="")
            for path in sorted(runs.rglob("*.safetensors"))
        }
        histories = {
            str(path.relative_to(runs)): path.read_text() for path in runs.rglob("metrics.jsonl")
        }
        kept.append((tensors, histories))
    (one, histories), (other, other_histories) = kept
    assert histories == other_histories
    assert len(histories) == 2
    assert one.keys() == other.keys()
    assert len(one) == 3
    for name, (tensors, metadata) in one.items():
        again, metadata_again = other[name]
        assert metadata == metadata_again
        assert tensors.keys() == again.keys()
        assert all(torch.equal(tensors[key], again[key]) for key in tensors)


class Lines(torch.nn.Module):
    """Layers by name; those in `idle` take no part in the loss."""

    def __init__(self, idle=(), **sizes):
        super().__init__()
        self.idle = idle
        self.layers = torch.nn.ModuleDict({n: torch.nn.Linear(3, k) for n, k in sizes.items()})

    def adam(self):
        optimizer = torch.optim.AdamW(self.parameters())
        used = [layer for name, layer in self.layers.items() if name not in self.idle]
        torch.stack([layer(torch.ones(3)).sum() for layer in used]).sum().backward()
        optimizer.step()
        return optimizer


PLACE = {"step": 1, "logged": 0, "identity": {}}


def test_a_parameter_that_was_never_trained_needs_no_optimiser_state(tmp_path):
    path, model = tmp_path / CHECKPOINT, Lines(idle=["b"], a=2, b=2)
    save_checkpoint(path, model, model.adam(), PLACE)
    fresh = Lines(a=2, b=2)
    optimizer = torch.optim.AdamW(fresh.parameters())
    assert load_checkpoint(path, fresh, optimizer, {}) == PLACE
    assert all(map(torch.equal, fresh.parameters(), model.parameters()))
    known = {n for n, p in fresh.named_parameters() if optimizer.state.get(p)}
    assert known == {"layers.a.weight", "layers.a.bias"}


@pytest.mark.parametrize(
    "other",
    [{"a": 2}, {"a": 2, "b": 2, "c": 2}, {"a": 2, "c": 2}, {"a": 2, "b": 1}, {"a": 2, "b": 3}],
)
def test_a_checkpoint_of_another_model_is_refused(other, tmp_path):
    path, model = tmp_path / CHECKPOINT, Lines(a=2, b=2)
    save_checkpoint(path, model, model.adam(), PLACE)
    fresh = Lines(**other)
    with pytest.raises(LabError, match=r"belongs to another model \(.*layers\.[bc]\.bias.*remove"):
        load_checkpoint(path, fresh, torch.optim.AdamW(fresh.parameters()), {})


def test_the_same_command_again_gets_a_folder_of_its_own(runs):
    changes = ["train.steps=2", "train.algo=baseline-mtp", "train.name=again"]
    assert TRAIN.main(arguments(runs, changes=changes)) == 0
    before = snapshot(runs / "again")
    assert TRAIN.main(arguments(runs, changes=changes)) == 0
    assert snapshot(runs / "again") == before
    assert (runs / "again-2" / "results.json").exists()
    assert TRAIN.main(arguments(runs, "--resume", changes=changes)) == 0  # complete: reads it


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_a_polite_signal_leaves_a_checkpoint_that_goes_on(sent, runs):
    name = f"interrupted-{sent.name}"
    changes = ["train.steps=5000", "train.algo=baseline-mtp", f"train.name={name}"]
    changes += ["train.log_every=1", "train.evaluate_every=5000", "train.checkpoint_every=5000"]
    command = [sys.executable, str(EXAMPLES / "train.py"), *arguments(runs, changes=changes)]
    log = runs / name / "baseline-mtp" / "metrics.jsonl"
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_text().count("\n") >= 3:
                process.send_signal(sent)
                break
            time.sleep(0.05)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "--resume" in out
    _, metadata = read_tensors(log.parent / "checkpoint.safetensors", advice="")
    step = metadata["step"]
    assert step >= 3
    stop = str(step + 2)
    assert TRAIN.main(arguments(runs, "--resume", "--stop-after", stop, changes=changes)) == 130
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, step + 3))


def test_the_command_line_writes_tables_plots_heatmaps_and_mlflow(tmp_path):
    changes = ["train.threads=1", "train.steps=6", "rho1.reference_steps=6", "compare.arms=[]"]
    words = [word for change in changes for word in ("--set", change)]
    done = launch(EXAMPLES / "train.py", "--config", TINY, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "clean held-out test files" in done.stdout
    assert "of the corrupted bytes" in done.stdout
    folder = tmp_path / "runs" / "tiny"
    for name in ("heatmap.html", "heatmap.png", "weights.png", "checkpoint.safetensors"):
        assert (folder / "rho1-wmtp" / name).stat().st_size > 1000
    assert 'class="x"' in (folder / "rho1-wmtp" / "heatmap.html").read_text()
    assert (folder / "losses.png").exists()
    with sqlite3.connect(folder / "mlflow.db") as store:
        names = {name for (name,) in store.execute("select distinct key from metrics")}
    assert {"loss", "rho1_usage_ratio", "weight_entropy", "test_head3_accuracy"} <= names
    assert not list(tmp_path.glob("mlruns"))


def test_quickstart_learns():
    done = launch(EXAMPLES / "quickstart.py")
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert losses[-1] < 0.1 * losses[0]
    assert len((EXAMPLES / "quickstart.py").read_text().splitlines()) < 60


def test_the_table_names_the_difference():
    counts = {"count": [[10.0, 10.0]] * 8, "loss": [[9.0, 12.0]] * 8}
    base = {"test": {**counts, "correct": [[5.0, 4.0]] * 8}}
    better = {"test": {**counts, "correct": [[6.0, 4.0]] * 8}}
    text = table({"baseline-mtp": base, "rho1-wmtp": better})
    assert "60.0%" in text
    assert "+10.0 [+10.0, +10.0]" in text


# ---------------------------------------------------------------- bad input


def refused(capsys, words, *wanted):
    assert TRAIN.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    for part in wanted:
        assert part in error
    return error


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("train.algo=rho2-wmtp", "did you mean 'rho1-wmtp'?"),
        ("train.algo=7", "expected str, got int"),
        ("train.algo=baseline", "choose one of baseline-ntp"),
        ("train.stepz=3", "did you mean 'steps'?"),
        ("trian.steps=3", "did you mean 'train'?"),
        ("train.steps=0", "must be at least 1"),
        ("train.steps=2.5", "expected int, got float"),
        ("train.steps=true", "expected int, got bool"),
        ("train.learning_rate=nan", "give a finite number"),
        ("rho1.keep=1.5", "at most 1"),
        ("rho1.mode=topk", "did you mean 'top_k'?"),
        ("compare.arms=baseline-mtp", "expected a list"),
        ("compare.arms=['baseline']", "did you mean 'baseline-"),
        ("model.dim=31", "multiple of model.attention_heads"),
        ("corpus.shares=[0.5, 0.5]", "three shares"),
        ("train.name=../up", "it names a folder"),
        ("train.steps", "write it as section.key=value"),
        ("corpus.root=/no/such/folder", "no folder"),
        ("corpus.train_bytes=1", "raise corpus.train_bytes"),
        ("corpus.skip=['*']", "0 usable .py files"),
    ],
)
def test_a_bad_value_is_one_clear_line(change, wanted, tmp_path, capsys):
    refused(capsys, arguments(tmp_path, changes=[change]), wanted)
    assert snapshot(tmp_path) == {}


def test_a_bad_command_line_is_one_clear_line(tmp_path, capsys):
    refused(capsys, ["--config", str(tmp_path / "no.toml")], "give an existing .toml file")
    refused(capsys, ["--confg", "x"], "--config")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    refused(capsys, ["--config", str(broken)], "not valid TOML")
    refused(capsys, arguments(tmp_path / "runs", "--resume"), "start one without --resume")


def test_tracking_without_mlflow_is_one_clear_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lab.experiment.find_spec", lambda name: None)
    words = arguments(tmp_path, changes=["tracking.mlflow=true"])
    refused(capsys, words, "install wmtp[examples]", "tracking.mlflow=false")
    assert snapshot(tmp_path) == {}


@pytest.fixture(scope="module")
def stopped(runs):
    changes = ["train.steps=6", "train.algo=baseline-mtp", "train.name=stopped"]
    assert TRAIN.main(arguments(runs, "--stop-after", "2", changes=changes)) == 130
    return changes


def test_a_truncated_checkpoint_is_refused_and_kept(runs, stopped, capsys):
    path = runs / "stopped" / "baseline-mtp" / "checkpoint.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(capsys, arguments(runs, "--resume", changes=stopped), "truncated", "remove")
        assert path.read_bytes() == whole[:size]
    path.write_bytes(whole)


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda lines: [b"\x80\x04 not JSON"], "line 1"),
        (lambda lines: [lines[0], lines[1][:20], *lines[2:]], "line 2"),
        (lambda lines: [*lines[:2], b"[1, 2]", b""], "line 3"),
        (lambda lines: [b'{"step": "1"}', *lines[1:]], "line 1"),
        (lambda lines: [lines[0], b'{"loss": 2.0}', *lines[2:]], "line 2"),
        (lambda lines: [lines[0], b'{"step": 2, "loss": null}', *lines[2:]], "line 2"),
        (lambda lines: [*lines[:-1], b"PK\x03"], "line 3"),
        (lambda lines: [b"[" * 100_000, *lines], "line 1"),
        (lambda lines: lines[1:], "1 lines, but the checkpoint was saved after 2"),
        (lambda lines: [], "0 lines, but the checkpoint was saved after 2"),
    ],
)
def test_a_damaged_history_is_refused_and_kept(damage, place, tmp_path, capsys):
    changes = [*KILLED, "train.steps=6"]
    assert TRAIN.main(arguments(tmp_path, "--stop-after", "2", changes=changes)) == 130
    path = tmp_path / "tiny" / "baseline-mtp" / "metrics.jsonl"
    damaged = b"\n".join(damage(path.read_bytes().split(b"\n")))
    path.write_bytes(damaged)
    capsys.readouterr()
    words = arguments(tmp_path, "--resume", changes=changes)
    refused(capsys, words, str(path), place, f"remove {path.parent}")
    assert path.read_bytes() == damaged


def test_a_checkpoint_that_does_not_say_how_far_it_is_is_refused(runs, stopped, capsys):
    path = runs / "stopped" / "baseline-mtp" / "checkpoint.safetensors"
    whole = path.read_bytes()
    tensors, metadata = read_tensors(path, advice="")
    for key in ("step", "logged"):
        write_tensors(path, tensors, {k: v for k, v in metadata.items() if k != key})
        refused(capsys, arguments(runs, "--resume", changes=stopped), f"say its {key}", "remove")
    path.write_bytes(whole)


def test_resuming_with_another_configuration_is_refused(runs, stopped, capsys):
    before = snapshot(runs / "stopped")
    words = arguments(runs, "--resume", changes=[*stopped, "train.seed=9"])
    refused(capsys, words, "train.seed (stored 1, given 9)")
    assert snapshot(runs / "stopped") == before


def test_a_reference_of_something_else_is_refused(runs, text, capsys, tmp_path):
    data = text.data["train"]
    identity, nll = corpus_identity(data), torch.ones(data.tokens.shape)
    path = tmp_path / "nll.safetensors"
    changes = [f"rho1.reference_nll={str(path)!r}", "train.steps=2", "train.name=given"]

    def check(*wanted):
        before = snapshot(tmp_path)
        refused(capsys, arguments(runs, changes=changes), str(path), *wanted)
        assert snapshot(tmp_path) == before
        assert not (runs / "given").exists()

    refused(capsys, arguments(runs, changes=changes), "no file")
    for key, value in (("tokenizer", "bpe/32000"), ("corpus", "0" * 16), ("packing", "1 row of 9")):
        save_signal(path, nll, {**identity, key: value})
        check(f"{key} (stored {value}, given {identity[key]})", "remove it")
    save_signal(path, nll, {})
    check("stored nothing")
    save_signal(path, nll[:-1], identity)
    check("shape")
    save_signal(path, nll * float("nan"), identity)
    check("NaN")
    path.write_bytes(path.read_bytes()[:200])
    check("truncated")
    save_signal(path, nll, identity)
    assert TRAIN.main(arguments(runs, changes=changes)) == 0


def test_a_cached_reference_is_used_again_and_checked(runs, capsys):
    changes = ["train.steps=2", "rho1.reference_steps=2", "train.name=cached"]
    assert TRAIN.main(arguments(runs, changes=changes)) == 0
    capsys.readouterr()
    assert TRAIN.main(arguments(runs, changes=changes)) == 0
    said = capsys.readouterr().out
    assert "the stored NLL" in said
    folders = {
        path.parent: read_tensors(path, advice="") for path in runs.glob("*/nll.safetensors")
    }
    (folder,) = [f for f, (_, kept) in folders.items() if kept["reference"]["steps"] == 2]
    path = folder / "nll.safetensors"
    tensors, identity = read_tensors(path, advice="")
    write_tensors(path, tensors, {**identity, "seed": 99})
    refused(capsys, arguments(runs, changes=changes), "seed (stored 99, given 1)", "remove it")


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": torch.ones(2)}, {"step": 1})
    before = snapshot(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"x": torch.zeros(2)}, {"step": 2})
    assert snapshot(tmp_path) == before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    model = torch.nn.Linear(2, 1)

    def loss(step):
        return model(torch.ones(2)).sum() * (1.0 if step < 3 else float("nan")), dict

    schedule = Schedule(
        steps=9, learning_rate=0.1, warmup=1, weight_decay=0.0, clip_norm=1.0,
        log_every=1, evaluate_every=9, checkpoint_every=2,
    )  # fmt: skip
    job = Job("wild", model, schedule, {}, loss, dict)
    with pytest.raises(LabError, match="nan at step 3; lower the learning rate"):
        fit(job, Tracker(tmp_path), Stop())
    tensors, metadata = read_tensors(tmp_path / CHECKPOINT, advice="")
    assert metadata["step"] == 2
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_file_is_valid(path):
    config = load_config(path)
    assert from_dict(config.as_dict()) == config


def test_a_section_must_be_a_table():
    with pytest.raises(LabError, match="write it as a section"):
        from_dict({"train": 3})
