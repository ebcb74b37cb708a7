"""A whole run: the text, what the methods need beforehand, every arm, and the comparison."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .arm import Arm, Signals, run_arm
from .checkpoint import differences, read_json, remove_leftovers, write_json, write_text
from .config import Config
from .corpus import SPLITS, Data, Document, Split, load_splits, pack
from .corruption import corrupt
from .critic import critic_values, stored_values
from .errors import LabError
from .plots import plot_losses
from .reference import reference_nll, stored_nll
from .report import table
from .tracking import MLflowStore, Tracker, versions
from .training import Stop
from .weighting import METHODS


class Text(NamedTuple):
    """The documents of every split, and the same ones packed into rows."""

    documents: dict[Split, list[Document]]
    data: Data


def prepare_text(config: Config) -> Text:
    """Read, split by file, corrupt some of the training files, pack."""
    documents = load_splits(config.corpus)
    seed = config.train.seed
    documents["train"] = corrupt(documents["train"], config.corruption, seed)
    data: Data = {split: pack(documents[split], config.model.context, seed) for split in SPLITS}
    return Text(documents, data)


def preflight(config: Config, text: Text, runs: Path) -> None:
    """Refuse what cannot work now, before a folder is made for the run."""
    if config.tracking.mlflow and not all(map(find_spec, ("mlflow", "sqlalchemy", "alembic"))):
        raise LabError(
            "tracking.mlflow: mlflow-skinny, sqlalchemy or alembic is missing; install "
            "wmtp[examples], or give --set tracking.mlflow=false"
        )
    arms = [METHODS[algo] for algo in arms_of(config)]
    if any(arm.reference for arm in arms):
        stored_nll(config, text.data, runs)
    if any(arm.critic for arm in arms):
        stored_values(config, text.data, runs)


def arms_of(config: Config) -> list[str]:
    """Every arm once, the main one last."""
    return [
        *dict.fromkeys(a for a in config.compare.arms if a != config.train.algo),
        config.train.algo,
    ]


def open_run(config: Config, runs: Path, resume: bool) -> Path:
    """A new numbered folder, or with `resume` the newest one of the same configuration."""
    name, number = config.train.name, 1
    while (runs / _numbered(name, number)).exists():
        number += 1
    if not resume:
        folder = runs / _numbered(name, number)
        folder.mkdir(parents=True)
        started = {"config": config.as_dict(), "seed": config.train.seed, "versions": versions()}
        write_json(folder / "run.json", started)
        return folder
    if number == 1:
        raise LabError(f"--resume: no run {runs / name}; start one without --resume")
    folder = runs / _numbered(name, number - 1)
    stored = read_json(folder / "run.json")
    if found := differences(stored.get("config", {}), config.as_dict()):
        raise LabError(
            f"--resume: {folder} was started with another {found}; give the same configuration, "
            "or start a new run without --resume"
        )
    remove_leftovers(folder)
    return folder


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


def run(config: Config, text: Text, folder: Path, stop: Stop) -> dict[str, Any]:
    """Train every arm of the configuration, the main one last, and compare them."""
    torch.set_num_threads(config.train.threads)
    open_tracker = partial(_open_tracker, config, folder)
    arms, (documents, data) = arms_of(config), text
    runs = folder.parent
    signals = Signals(
        reference_nll=reference_nll(config, data, runs, open_tracker, stop)
        if any(METHODS[algo].reference for algo in arms)
        else None,
        values=critic_values(config, documents, data, runs, open_tracker, stop)
        if any(METHODS[algo].critic for algo in arms)
        else None,
    )
    results = {}
    for algo in arms:
        arm = Arm(algo, config, data["train"], signals)
        results[algo] = run_arm(arm, data, folder / algo, open_tracker, stop)
    _finish(config, folder, results)
    return results


def _open_tracker(config: Config, run_folder: Path, name: str, folder: Path) -> Tracker:
    store = MLflowStore(run_folder, name, config.as_dict()) if config.tracking.mlflow else None
    return Tracker(folder, store)


def _finish(config: Config, folder: Path, results: dict[str, Any]) -> None:
    if config.tracking.plots:
        histories = {algo: Tracker(folder / algo).history() for algo in results}
        plot_losses(histories, config.model.heads, folder / "losses.png")
    started = read_json(folder / "run.json")
    kept = {
        algo: {key: value for key, value in result.items() if key != "test"}
        for algo, result in results.items()
    }
    write_json(folder / "results.json", {**started, "results": kept})
    write_text(folder / "table.txt", table(results) + "\n")
