"""Rho-1's reference: a model of clean text, and its surprise at every training byte."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from wmtp import linear_token_nll, linear_weighted_mtp_loss

from .batches import batch_rows, take
from .config import Config
from .corpus import IGNORE, Data, Packed
from .evaluation import CHUNK, evaluate
from .model import ByteLM, build
from .signals import corpus_identity, key_of, load_signal, save_signal
from .tracking import Metrics, OpenTracker, Tracker
from .training import Job, Schedule, Stop, fit, say


def reference_nll(
    config: Config, data: Data, runs: Path, open_tracker: OpenTracker, stop: Stop
) -> Tensor:
    """`[rows, seq]`: what a model of clean text thinks of each training byte, computed once."""
    stored = stored_nll(config, data, runs)
    if stored is not None:
        say("reference: the stored NLL of every training byte is used")
        return stored
    train, identity, path = (
        data["train"],
        reference_identity(config, data),
        place(config, data, runs),
    )
    tracker = open_tracker("reference", path.parent)
    nll = score(train_reference(config, data, tracker, identity, stop), train)
    save_signal(path, nll, identity)
    tracker.finish()
    noisy, text = train.corrupted, train.segment_ids >= 0
    clean = f"{nll[text & ~noisy].mean():.2f} nats per clean training byte"
    corrupted = f", {nll[noisy].mean():.2f} per corrupted one" if noisy.any() else ""
    say(f"reference: {clean}{corrupted}")
    return nll


def stored_nll(config: Config, data: Data, runs: Path) -> Tensor | None:
    """The NLL that was given or cached, refused if it belongs to anything else; None: not made."""
    given = config.rho1.reference_nll
    if given:
        return load_signal(Path(given), corpus_identity(data["train"]), data["train"])
    path = place(config, data, runs)
    if not path.exists():
        return None
    return load_signal(path, reference_identity(config, data), data["train"])


def place(config: Config, data: Data, runs: Path) -> Path:
    """Where this reference's NLL is kept: a folder for everything that it depends on."""
    return runs / f"reference-{key_of(reference_identity(config, data))}" / "nll.safetensors"


def reference_identity(config: Config, data: Data) -> dict[str, object]:
    """Everything that the cached numbers depend on."""
    return {
        **corpus_identity(data["train"]),
        "seed": config.train.seed,
        "reference": {
            "corpus": data["reference"].fingerprint(),
            "batch": config.train.batch,
            "model": asdict(replace(config.model, heads=1)),
            **Schedule.of(config.train, config.rho1.reference_steps).identity(),
        },
    }


@torch.no_grad()
def score(model: ByteLM, packed: Packed) -> Tensor:
    """The token-indexed next-byte NLL of every row."""
    found = []
    for rows in torch.arange(packed.rows).split(CHUNK):
        tokens, segments = packed.tokens[rows], packed.segment_ids[rows]
        trunk = model.trunk(tokens, segments)  # head 0 is the trunk itself
        labels = packed.labels[rows]
        found.append(
            linear_token_nll(
                trunk, model.unembedding, labels, ignore_index=IGNORE, segment_ids=segments
            )
        )
    return torch.cat(found)


def train_reference(
    config: Config, data: Data, tracker: Tracker, identity: dict[str, object], stop: Stop
) -> ByteLM:
    """Next-byte training on files that no arm trains on."""
    model = build(ByteLM, replace(config.model, heads=1), config.train.seed)
    clean, size, seed = data["reference"], config.train.batch, config.train.seed

    def loss(step: int) -> tuple[Tensor, Callable[[], Metrics]]:
        batch = take(clean, batch_rows(clean.rows, size, seed, step), heads=1)
        trunk = model.trunk(batch.tokens, batch.segment_ids)
        return linear_weighted_mtp_loss(trunk, model.unembedding, batch.targets), lambda: {}

    def check() -> Metrics:
        found = evaluate(model, data["validation"], heads=1)
        loss, hits = found.head_loss()[0], found.head_accuracy()[0]
        say(f"reference: validation loss {loss:.3f}, top-1 {hits:.1%}")
        return found.metrics("validation")

    schedule = Schedule.of(config.train, config.rho1.reference_steps)
    fit(Job("reference", model, schedule, identity, loss, check), tracker, stop)
    return model
