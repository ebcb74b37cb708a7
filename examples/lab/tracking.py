"""What a run says about itself: a JSON-lines history, and MLflow in a local SQLite store."""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .checkpoint import write_text
from .errors import LabError


Metrics = Mapping[str, float | Tensor]
LINE_START = b'{"step": '  # of every line in a history
BATCH_LIMIT = 1000  # the most metrics that MLflow takes in one call


def versions() -> dict[str, str]:
    """The software and the machine that a result depends on."""
    try:
        library = version("wmtp")
    except PackageNotFoundError:
        library = "not installed (read from its source folder)"
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "wmtp": library,
        "platform": platform.platform(),
    }


class Tracker:
    """Writes every metric to `metrics.jsonl`, and to MLflow where that is wanted."""

    def __init__(self, folder: Path, store: "Store | None" = None) -> None:
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.store = store
        self.logged = 0  # lines of the history
        folder.mkdir(parents=True, exist_ok=True)

    def rewind(self, logged: int) -> None:
        """Forget all but the first `logged` lines: what came after is about to be made again."""
        history = self.history()
        if len(history) < logged:
            raise LabError(
                f"{self.path}: {len(history)} lines, but the checkpoint was saved after {logged}; "
                f"{self._advice()}"
            )
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in history[:logged]))
        self.logged = logged

    def log(self, step: int, metrics: Metrics) -> None:
        """One line per call; tensors become numbers here and nowhere earlier."""
        numbers = {name: float(value) for name, value in metrics.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.logged += 1
        if self.store is not None:
            self.store.log(step, numbers)

    def flush(self) -> None:
        """Called before every checkpoint: what a checkpoint counts as logged is on the disk."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        if self.store is not None:
            self.store.flush()

    def finish(self, files: Iterable[Path] = ()) -> None:
        """The part is complete: hand its files to the store."""
        if self.store is not None:
            self.store.finish(files)

    def history(self) -> list[dict[str, float]]:
        """Everything logged so far, in the order of the steps; a last line cut short is left out."""
        if not self.path.exists():
            return []
        *lines, rest = self.path.read_bytes().split(b"\n")
        if rest[: len(LINE_START)] != LINE_START[: len(rest)]:  # not what a kill leaves of a line
            lines.append(rest)
        return [self._entry(line, number) for number, line in enumerate(lines, 1)]

    def _entry(self, line: bytes, number: int) -> dict[str, float]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not {int, float}.issuperset(map(type, entry.values())):
            entry = {}
        if type(entry.get("step")) is not int:
            raise LabError(f"{self.path}, line {number}: damaged; {self._advice()}")
        return entry

    def _advice(self) -> str:
        return f"remove {self.folder} to train this part again"


OpenTracker = Callable[[str, Path], "Tracker"]  # the name of a part, the folder that it writes to


class Store(Protocol):
    """A place besides the folder where metrics, parameters and files go."""

    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def finish(self, files: Iterable[Path]) -> None: ...


class MLflowStore:
    """One MLflow run in `mlflow.db`; look at it with `mlflow ui --backend-store-uri sqlite:///…`."""

    def __init__(self, run_folder: Path, name: str, parameters: dict[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing leaves the machine
        from mlflow import MlflowClient  # heavy: not before it is needed

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        root = run_folder.resolve()
        self.client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
        experiment = self.client.get_experiment_by_name(run_folder.name)
        place = (root / "mlflow-artifacts").as_uri()
        key = experiment.experiment_id if experiment else self.client.create_experiment(
            run_folder.name, artifact_location=place
        )  # fmt: skip
        self.waiting: list[Any] = []  # one commit for many metrics: a commit each would be slow
        same = self._same_run(key, name)
        self.run_id = same or self._new_run(key, name, parameters)
        # Of a run that was stopped: steps that come again give the same numbers, and stay single.
        self.held = self._held() if same else set[tuple[str, int]]()

    def _same_run(self, experiment: str, name: str) -> str | None:
        wanted = f"attributes.run_name = '{name}'"
        found = self.client.search_runs([experiment], wanted, max_results=1)
        return found[0].info.run_id if found else None

    def _new_run(self, experiment: str, name: str, parameters: dict[str, Any]) -> str:
        run_id = self.client.create_run(experiment, run_name=name).info.run_id
        for section, values in parameters.items():
            for key, value in values.items():
                self.client.log_param(run_id, f"{section}.{key}", value)
        return run_id

    def _held(self) -> set[tuple[str, int]]:
        names = self.client.get_run(self.run_id).data.metrics
        histories = (self.client.get_metric_history(self.run_id, name) for name in names)
        return {(metric.key, metric.step) for history in histories for metric in history}

    def log(self, step: int, numbers: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {name: number for name, number in numbers.items() if (name, step) not in self.held}
        self.held |= {(name, step) for name in new}
        self.waiting += [Metric(name, value, now, step) for name, value in new.items()]

    def flush(self) -> None:
        for start in range(0, len(self.waiting), BATCH_LIMIT):
            part = self.waiting[start : start + BATCH_LIMIT]
            self.client.log_batch(self.run_id, metrics=part, synchronous=True)
        self.waiting = []

    def finish(self, files: Iterable[Path]) -> None:
        self.flush()
        for file in files:
            self.client.log_artifact(self.run_id, str(file))
        self.client.set_terminated(self.run_id)
