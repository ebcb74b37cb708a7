"""The training loop, the same for every arm, for the reference and for the critic."""

import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import PROGRESS, load_checkpoint, remove_leftovers, save_checkpoint
from .config import TrainConfig
from .errors import Interrupted, LabError
from .tracking import Metrics, Tracker


CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float
    clip_norm: float
    log_every: int
    evaluate_every: int
    checkpoint_every: int

    @staticmethod
    def of(config: TrainConfig, steps: int, learning_rate: float | None = None) -> "Schedule":
        """The schedule that the section `[train]` describes, with a length of its own."""
        return Schedule(
            steps=steps,
            learning_rate=learning_rate or config.learning_rate,
            warmup=config.warmup,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            log_every=config.log_every,
            evaluate_every=config.evaluate_every,
            checkpoint_every=config.checkpoint_every,
        )

    def identity(self) -> dict[str, float]:
        """What changes the numbers; how often something is logged or saved does not."""
        names = ("steps", "learning_rate", "warmup", "weight_decay", "clip_norm")
        return {name: getattr(self, name) for name in names}

    def rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to a twentieth: a function of the step alone."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min((step + 1) / max(self.warmup, 1), 0.05 + 0.95 * cosine)


@dataclass(frozen=True)
class Job:
    """What is trained: `loss(step)` gives the loss and a function that makes the metrics."""

    title: str
    model: nn.Module
    schedule: Schedule
    identity: dict[str, Any]  # a checkpoint made with anything else is refused
    loss: Callable[[int], tuple[Tensor, Callable[[], Metrics]]]
    evaluate: Callable[[], Metrics]


def say(text: str) -> None:
    """A line on stdout, above the progress bar if one is shown."""
    tqdm.write(text)
    sys.stdout.flush()


class Stop:
    """Makes the first Ctrl-C mean "finish this step and save"; a second one interrupts at once.

    SIGTERM, which schedulers and `kill` send, means the same.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, after: int | None = None) -> None:
        self.after = after  # stop by itself after so many steps of each job
        self.requested = False

    def __enter__(self) -> "Stop":
        self._before = [signal.signal(number, self._interrupted) for number in self.SIGNALS]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for number, before in zip(self.SIGNALS, self._before, strict=True):
            signal.signal(number, before)

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def now(self, done: int) -> bool:
        """Whether to stop with `done` steps made."""
        return self.requested or done == self.after


def fit(job: Job, tracker: Tracker, stop: Stop) -> None:
    """Train to the end of the schedule, from the checkpoint in the tracker's folder if any."""
    optimizer = _optimizer(job)
    path = tracker.folder / CHECKPOINT
    remove_leftovers(tracker.folder)
    done, logged = 0, 0
    if path.exists():
        kept = load_checkpoint(path, job.model, optimizer, job.identity)
        done, logged = (kept[key] for key in PROGRESS)
    tracker.rewind(logged)
    bar = tqdm(
        total=job.schedule.steps, initial=done, desc=job.title, unit="step", leave=True,
        mininterval=0.5, disable=None,  # silent where stderr is not a terminal
    )  # fmt: skip
    with bar:
        while done < job.schedule.steps:
            metrics = _step(job, optimizer, done, bar)
            done += 1
            bar.update()
            last, stopping = done == job.schedule.steps, stop.now(done)
            if done % job.schedule.log_every == 0 or last:
                tracker.log(done, metrics())
            if done % job.schedule.evaluate_every == 0 or last:
                tracker.log(done, job.evaluate())
            if stopping or last or done % job.schedule.checkpoint_every == 0:
                tracker.flush()
                place = {"step": done, "logged": tracker.logged, "identity": job.identity}
                save_checkpoint(path, job.model, optimizer, place)
            if stopping and not last:
                raise Interrupted(done)
    if stop.requested:
        raise Interrupted(done)


def _optimizer(job: Job) -> torch.optim.Optimizer:
    """AdamW that decays matrices only."""
    matrices = [p for p in job.model.parameters() if p.dim() >= 2]
    others = [p for p in job.model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": job.schedule.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=job.schedule.learning_rate, betas=(0.9, 0.98), fused=True)


def _step(job: Job, optimizer: torch.optim.Optimizer, step: int, bar: Any) -> Callable[[], Metrics]:
    rate = job.schedule.rate(step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss, metrics = job.loss(step)
    if not math.isfinite(loss.item()):
        raise LabError(
            f"{job.title}: the loss is {loss.item()} at step {step}; lower the learning rate (the "
            "last checkpoint is untouched)"
        )
    loss.backward()
    norm = nn.utils.clip_grad_norm_(job.model.parameters(), job.schedule.clip_norm)
    optimizer.step()
    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return lambda: {
        "loss": loss.detach(), "grad_norm": norm, "learning_rate": rate, **metrics()
    }  # fmt: skip
