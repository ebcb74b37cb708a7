"""One arm: a method, trained from the same weights on the same batches as every other one."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wmtp import MTPLossStats, linear_weighted_mtp_loss_and_stats

from .batches import Batch, batch_rows, take
from .checkpoint import read_json, write_json
from .config import Config
from .corpus import Data, Packed
from .evaluation import Score, evaluate
from .heatmap import Heatmap, draw_heatmap, write_heatmap
from .model import ByteLM, build
from .plots import plot_weights
from .tracking import Metrics, OpenTracker, Tracker
from .training import Job, Schedule, Stop, fit, say
from .watching import Seen, Selection, step_metrics, total
from .weighting import METHODS, Method, View, diagnostics, uniform


REPORT_BATCHES = 50  # batches over which the final weights are judged
HEATMAP_ROWS = 4


@dataclass(frozen=True)
class Signals:
    """What was computed about the training corpus beforehand, each `[rows, seq]`."""

    reference_nll: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True)
class Arm:
    """Everything that one arm needs; its loss is a function of the model and the step."""

    algo: str
    config: Config
    train: Packed
    signals: Signals

    @property
    def method(self) -> Method:
        return METHODS[self.algo]

    @property
    def heads(self) -> int:
        return 1 if self.method.single_head else self.config.model.heads

    def batch(self, step: int) -> Batch:
        options = self.config.train
        rows = batch_rows(self.train.rows, options.batch, options.seed, step)
        return take(self.train, rows, self.heads)

    def view(self, batch: Batch, step: int) -> View:
        nll, values = self.signals.reference_nll, self.signals.values
        return View(
            config=self.config,
            step=step,
            segment_ids=batch.segment_ids,
            trained=batch.segment_ids >= 0,
            reference_nll=None if nll is None else nll[batch.rows],
            values=None if values is None else values[batch.rows],
        )

    def loss(
        self, model: ByteLM, batch: Batch, step: int
    ) -> tuple[Tensor, MTPLossStats, Seen, View]:
        """The weighted loss of one batch: the method sees the cross entropy of this very pass."""
        view, seen = self.view(batch, step), []

        def weigh(token_ce: Tensor, valid: Tensor) -> Tensor:
            weights = self.method.weigh(token_ce, valid, view)
            seen.append(Seen(weights, valid, batch.corrupted))
            return weights

        hidden = model(batch.tokens, batch.segment_ids)[:, :, : self.heads]
        loss, stats = linear_weighted_mtp_loss_and_stats(
            hidden, model.unembedding, batch.targets, weigh
        )
        return loss, stats, seen[0], view


def run_arm(
    arm: Arm, data: Data, folder: Path, open_tracker: OpenTracker, stop: Stop
) -> dict[str, Any]:
    """Train one arm, or go on with it, or read what it gave if it is complete."""
    done = folder / "results.json"
    if done.exists():
        say(f"{arm.algo}: {done} (made before)")
        return read_json(done)
    model = build(ByteLM, arm.config.model, arm.config.train.seed)
    tracker = open_tracker(arm.algo, folder)
    started = time.monotonic()
    fit(_job(arm, model, data), tracker, stop)
    result = {
        "algo": arm.algo,
        "heads": arm.heads,
        "seconds_of_training_since_start_or_resume": round(time.monotonic() - started, 1),
        "test": evaluate(model, data["test"], arm.heads).as_dict(),
    }
    selection = judge(arm, model)
    if arm.method.weigh is not uniform:
        say(f"{arm.algo}: {selection.sentence()}")
    result["selection"] = {name: value.item() for name, value in selection.metrics().items()}
    score = Score.from_dict(result["test"])
    result |= {"test_head_loss": score.head_loss(), "test_head_accuracy": score.head_accuracy()}
    steps = arm.config.train.steps
    tracker.log(steps, score.metrics("test"))
    files = draw(arm, model, folder, tracker) if arm.config.tracking.plots else []
    tracker.flush()  # a run that has its results is not looked at again
    write_json(done, result)
    tracker.finish([done, *files])
    return result


def _job(arm: Arm, model: ByteLM, data: Data) -> Job:
    def loss(step: int) -> tuple[Tensor, Callable[[], Metrics]]:
        found, stats, seen, view = arm.loss(model, arm.batch(step), step)
        return found, lambda: {
            **step_metrics(seen, stats),
            **diagnostics(arm.method, stats.token_ce, seen.weights, seen.valid, view),
        }

    def check() -> Metrics:
        score = evaluate(model, data["validation"], arm.heads)
        loss, hits = score.head_loss()[0], score.head_accuracy()[0]
        say(f"{arm.algo}: validation loss {loss:.3f}, top-1 {hits:.1%} (head 0)")
        return score.metrics("validation")

    options = arm.config.train
    identity = {
        "algo": arm.algo,
        "corpus": arm.train.fingerprint(),
        "seed": options.seed,
        "batch": options.batch,
        **{name: arm.config.as_dict()[name] for name in ("model", "rho1", "critic", "combined")},
        **Schedule.of(options, options.steps).identity(),
    }
    schedule = Schedule.of(options, options.steps)
    return Job(arm.algo, model, schedule, identity, loss, check)


@torch.no_grad()
def judge(arm: Arm, model: ByteLM) -> Selection:
    """Which bytes the trained model's weights fall on, over the last batches of the training."""
    last = arm.config.train.steps
    steps = range(max(0, last - REPORT_BATCHES), last)
    return total([Selection.of(arm.loss(model, arm.batch(s), s)[2]) for s in steps])


@torch.no_grad()
def draw(arm: Arm, model: ByteLM, folder: Path, tracker: Tracker) -> list[Path]:
    """The weights over time, and on a few rows of the training text."""
    noisy = arm.train.corrupted.any(1)
    order = torch.cat([noisy.nonzero()[:, 0], (~noisy).nonzero()[:, 0]])
    half = min(HEATMAP_ROWS // 2, int(noisy.sum()))
    picked = torch.cat([order[:half], order[noisy.sum() :][: HEATMAP_ROWS - half]])
    batch = take(arm.train, picked, arm.heads)
    seen = arm.loss(model, batch, arm.config.train.steps)[2]
    # a byte's weight is the one that head 0 gave it, one place before
    weights = torch.zeros(batch.tokens.shape)
    weights[:, 1:] = seen.weights[:, :-1, 0]
    title = f"{arm.algo}: the weight of every byte (head 0)"
    heatmap = Heatmap(title, batch.tokens, weights, batch.corrupted)
    return [
        plot_weights(tracker.history(), folder / "weights.png", arm.algo),
        write_heatmap(heatmap, folder / "heatmap.html"),
        draw_heatmap(heatmap, folder / "heatmap.png"),
    ]
