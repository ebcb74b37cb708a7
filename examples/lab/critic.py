"""The critic: stage 1 learns which code compiles, stage 2 values every prefix of the corpus."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from wmtp import pairwise_ranking_loss

from .batches import batch_rows
from .config import Config
from .corpus import Data, Document, Packed, Split
from .evaluation import CHUNK
from .model import ByteCritic, build
from .pairs import Side, functions, make_pairs
from .signals import corpus_identity, key_of, load_signal, save_signal
from .tracking import Metrics, OpenTracker, Tracker
from .training import Job, Schedule, Stop, fit, say


Pairs = tuple[Side, Side]


def critic_values(
    config: Config,
    documents: Mapping[Split, Sequence[Document]],
    data: Data,
    runs: Path,
    open_tracker: OpenTracker,
    stop: Stop,
) -> Tensor:
    """`[rows, seq]`: the critic's value of each prefix of the training corpus, computed once."""
    stored = stored_values(config, data, runs)
    if stored is not None:
        say("critic: the stored value of every prefix is used")
        return stored
    options, identity, path = (
        config.critic,
        critic_identity(config, data),
        place(config, data, runs),
    )
    seen, unseen = (
        functions(documents[split], options.max_bytes) for split in ("reference", "validation")
    )
    room, seed = options.max_bytes + 1, config.train.seed
    train_pairs = make_pairs(seen, options.pairs, room, seed)
    test_pairs = make_pairs(unseen, options.heldout_pairs, room, seed)
    tracker = open_tracker("critic", path.parent)
    model = train_critic(config, train_pairs, test_pairs, tracker, identity, stop)
    values = value_rows(model, data["train"])
    save_signal(path, values, identity)
    tracker.finish()
    return values


def stored_values(config: Config, data: Data, runs: Path) -> Tensor | None:
    """The cached values, refused if they belong to anything else; None: not made yet."""
    path = place(config, data, runs)
    return (
        load_signal(path, critic_identity(config, data), data["train"]) if path.exists() else None
    )


def place(config: Config, data: Data, runs: Path) -> Path:
    """Where this critic's values are kept: a folder for everything that they depend on."""
    return runs / f"critic-{key_of(critic_identity(config, data))}" / "values.safetensors"


def critic_identity(config: Config, data: Data) -> dict[str, object]:
    """Everything that the cached values depend on."""
    options = config.critic
    return {
        **corpus_identity(data["train"]),
        "seed": config.train.seed,
        "critic": {
            "corpus": data["reference"].fingerprint(),
            "heldout": data["validation"].fingerprint(),
            "batch": options.batch,
            "pairs": options.pairs,
            "heldout_pairs": options.heldout_pairs,
            "max_bytes": options.max_bytes,
            "pool": options.pool,
            "model": asdict(replace(config.model, heads=1)),
            **_schedule(config).identity(),
        },
    }


def train_critic(
    config: Config,
    train_pairs: Pairs,
    test_pairs: Pairs,
    tracker: Tracker,
    identity: dict[str, object],
    stop: Stop,
) -> ByteCritic:
    """Stage 1: rank the function that compiles above the one that does not."""
    options, seed = config.critic, config.train.seed
    model = build(ByteCritic, config.model, seed)

    def loss(step: int) -> tuple[Tensor, Callable[[], Metrics]]:
        rows = batch_rows(options.pairs, options.batch, seed, step)
        good, bad = (Side(side.tokens[rows], side.valid[rows]) for side in train_pairs)
        # one forward pass for both sides of the pairs
        tokens = torch.cat([good.tokens, bad.tokens])
        values = model(tokens, torch.zeros_like(tokens))
        chosen, rejected = values.chunk(2)
        found = pairwise_ranking_loss(chosen, rejected, good.valid, bad.valid, pool=options.pool)
        return found, lambda: {}

    def check() -> Metrics:
        right = pair_accuracy(model, test_pairs, options.pool)
        say(f"critic: {right:.1%} of {options.heldout_pairs} held-out pairs in the right order")
        return {"heldout_pair_accuracy": right}

    fit(Job("critic", model, _schedule(config), identity, loss, check), tracker, stop)
    return model


def _schedule(config: Config) -> Schedule:
    return Schedule.of(config.train, config.critic.steps, config.critic.learning_rate)


@torch.no_grad()
def pair_accuracy(model: ByteCritic, pairs: Pairs, pool: str) -> float:
    """The share of pairs in which the function that compiles has the higher value."""
    scores = []
    for side in pairs:
        found = []
        for rows in torch.arange(len(side.tokens)).split(CHUNK):
            tokens, valid = side.tokens[rows], side.valid[rows]
            values = model(tokens, torch.zeros_like(tokens))
            if pool == "mean":
                found.append((values * valid).sum(1) / valid.sum(1))
            else:
                found.append(values.gather(1, valid.sum(1, keepdim=True))[:, 0])
        scores.append(torch.cat(found))
    return (scores[0] > scores[1]).float().mean().item()


@torch.no_grad()
def value_rows(model: ByteCritic, packed: Packed) -> Tensor:
    """Stage 2's signal: the value of the prefix that ends at each byte."""
    pieces = torch.arange(packed.rows).split(CHUNK)
    return torch.cat([model(packed.tokens[rows], packed.segment_ids[rows]) for rows in pieces])
