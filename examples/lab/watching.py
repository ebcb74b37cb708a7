"""What the weights of one batch look like, and whether they mean anything."""

from typing import NamedTuple

import torch
from torch import Tensor

from wmtp import MTPLossStats, align_to_heads, check_weights, weight_statistics

from .errors import LabError


HIGH = 1.0 - 1e-6  # a byte counts as selected when its weight is at least the mean weight, 1


class Seen(NamedTuple):
    """The weights that a step used, `[batch seq heads]`, and what they were given to."""

    weights: Tensor
    valid: Tensor
    corrupted: Tensor  # `[batch seq]`


def step_metrics(seen: Seen, stats: MTPLossStats) -> dict[str, Tensor]:
    """Every number that is logged about one training step, beside the loss."""
    try:
        check_weights(seen.weights, seen.valid)
    except ValueError as error:
        raise LabError(f"the weights are unusable: {error}") from None
    count = stats.token_count.clamp(min=1)
    ce = stats.token_ce.sum((0, 1)) / count
    heads = range(len(count))
    return {
        "ce_mean": stats.token_ce.sum() / stats.token_count.sum(),
        **{f"head{h}_loss": ce[h] for h in heads},
        **{f"head{h}_weighted_loss": (stats.head_loss / stats.weight_sum)[h] for h in heads},
        **{f"head{h}_accuracy": (stats.head_accuracy / count)[h] for h in heads},
        "valid_token_ratio": seen.valid.float().mean(),
        **weight_statistics(seen.weights, seen.valid)._asdict(),
        **Selection.of(seen).metrics(),
    }


class Selection(NamedTuple):
    """Sums over predictions of corrupted and of clean bytes, so that batches can be added."""

    corrupted: Tensor
    clean: Tensor
    corrupted_weight: Tensor
    clean_weight: Tensor
    corrupted_selected: Tensor
    clean_selected: Tensor

    @staticmethod
    def of(seen: Seen) -> "Selection":
        """Count over all heads; a prediction is corrupted when the byte that it predicts is."""
        heads = seen.weights.shape[-1]
        noisy = align_to_heads(seen.corrupted, heads) & seen.valid
        clean = ~noisy & seen.valid
        high = seen.weights >= HIGH
        sums = (
            noisy, clean, seen.weights * noisy, seen.weights * clean, high & noisy, high & clean
        )  # fmt: skip
        return Selection(*(part.double().sum() for part in sums))

    def plus(self, other: "Selection") -> "Selection":
        return Selection(*(a + b for a, b in zip(self, other, strict=True)))

    def metrics(self) -> dict[str, Tensor]:
        """Shares and means; what concerns corrupted bytes is left out where there are none."""
        clean, selected = self.clean, self.corrupted_selected + self.clean_selected
        found = {
            "corrupted_ratio": self.corrupted / (self.corrupted + clean),
            "weight_on_clean": self.clean_weight / clean,
            "selected_clean": self.clean_selected / clean,
            "selection_precision": self.clean_selected / selected,
        }
        if self.corrupted:
            found["weight_on_corrupted"] = self.corrupted_weight / self.corrupted
            found["selected_corrupted"] = self.corrupted_selected / self.corrupted
        return {name: value for name, value in found.items() if value.isfinite()}

    def sentence(self) -> str:
        """The same for a person."""
        m = {name: value.item() for name, value in self.metrics().items()}
        if "weight_on_corrupted" not in m:
            return "no corrupted byte in the last batches to tell from clean ones"
        return (
            f"selected {m['selected_corrupted']:.1%} of the corrupted bytes and "
            f"{m['selected_clean']:.1%} of the clean ones; {m['selection_precision']:.1%} of what "
            f"it selected is clean ({1 - m['corrupted_ratio']:.1%} of all bytes are); mean weight "
            f"{m['weight_on_corrupted']:.2f} on corrupted, {m['weight_on_clean']:.2f} on clean"
        )


def total(parts: list[Selection]) -> Selection:
    """The sum over batches."""
    zero = Selection(*(torch.zeros((), dtype=torch.double) for _ in Selection._fields))
    for part in parts:
        zero = zero.plus(part)
    return zero
