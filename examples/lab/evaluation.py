"""Loss and top-1 accuracy of every head on held-out text, and how sure a difference is."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wmtp import linear_weighted_mtp_loss_and_stats

from .batches import take
from .corpus import Packed
from .model import ByteLM
from .seeds import generator


CHUNK = 16  # rows per forward pass, and the unit that the bootstrap resamples


@dataclass(frozen=True)
class Score:
    """Sums over pieces of the text, each `[pieces, heads]`, so that pieces can be resampled."""

    loss: Tensor
    correct: Tensor
    count: Tensor

    def head_loss(self) -> list[float]:
        return (self.loss.sum(0) / self.count.sum(0)).tolist()

    def head_accuracy(self) -> list[float]:
        return (self.correct.sum(0) / self.count.sum(0)).tolist()

    def metrics(self, prefix: str) -> dict[str, float]:
        named = {"loss": self.head_loss(), "accuracy": self.head_accuracy()}
        return {
            f"{prefix}_head{h}_{name}": value
            for name, values in named.items()
            for h, value in enumerate(values)
        }

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).tolist() for name in ("loss", "correct", "count")}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Score":
        return Score(
            *(torch.tensor(data[name], dtype=torch.double) for name in ("loss", "correct", "count"))
        )


@torch.no_grad()
def evaluate(model: ByteLM, packed: Packed, heads: int) -> Score:
    """Score the first `heads` heads; no prediction crosses a document here either."""
    pieces = []
    for rows in torch.arange(packed.rows).split(CHUNK):
        batch = take(packed, rows, heads)
        hidden = model(batch.tokens, batch.segment_ids)[:, :, :heads]
        _, stats = linear_weighted_mtp_loss_and_stats(hidden, model.unembedding, batch.targets)
        pieces.append((stats.head_loss, stats.head_accuracy, stats.token_count))
    return Score(*(torch.stack(column).double() for column in zip(*pieces, strict=True)))


def accuracy_gain(score: Score, base: Score, heads: int) -> list[tuple[float, float, float]]:
    """Per head: the gain in accuracy and its paired 95% bootstrap interval over the pieces.

    It says how sure the difference between these two models is, not between two methods: that
    would need several seeds.
    """
    pieces = len(score.count)
    draws = torch.randint(pieces, (2000, pieces), generator=generator("bootstrap"))
    found = []
    for head in range(heads):
        wins = (score.correct - base.correct)[:, head]
        count = score.count[:, head]
        spread = wins[draws].sum(1) / count[draws].sum(1)
        low, high = spread.quantile(spread.new_tensor([0.025, 0.975])).tolist()
        found.append(((wins.sum() / count.sum()).item(), low, high))
    return found
