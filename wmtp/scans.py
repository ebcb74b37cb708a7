"""Recurrences over the trained tokens of packed documents, all steps at once."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wmtp import _checks
from wmtp.documents import find_documents


class Trajectories(NamedTuple):
    """The trained tokens of each document, in order, as a critic sees them.

    Attributes:
        trained: ``[batch seq]``, the tokens that carry a reward and a gradient.
        continues: ``[batch seq]``, whether token ``t − 1`` stands in the same document as ``t``.
        inner: ``[batch seq]``, whether token ``t + 1`` does.
    """

    trained: Bool[Tensor, "batch seq"]
    continues: Bool[Tensor, "batch seq"]
    inner: Bool[Tensor, "batch seq"]

    def last(self) -> Bool[Tensor, "batch seq"]:
        """``[batch seq]``, the last trained token of each document."""
        still_to_come = reverse_scan(self.trained.float(), self.inner.float())
        return self.trained & (still_to_come == 1)


def find_trajectories(values: Tensor, valid: Tensor, **descriptions: Tensor | None) -> Trajectories:
    """Read the trajectories from the mask of trained tokens and the descriptions of documents."""
    _checks.rank_in("values", values, (2,), "[batch seq]")
    _checks.masks("valid", valid, "values", values)
    _checks.same_device(values=values, valid=valid)
    documents = find_documents(values, **descriptions, name="values")
    trained = valid & documents.real
    continues = documents.continues()
    return Trajectories(trained, continues, shift_left(continues))


def scan_trained(
    terms: Float[Tensor, "batch seq"], decay: float, tracks: Trajectories
) -> Float[Tensor, "batch seq"]:
    """Solve ``out_j = terms_j + decay · out_{j'}``, ``j'`` the next trained token of the document.

    Untrained tokens in between hand on what they get; the result is 0 at them.
    """
    own = torch.where(tracks.trained, terms, 0)
    if decay == 0:
        return own  # nothing is handed on
    # Filled in the dtype of the terms: a Python number in `where` would be rounded to float32.
    coefficients = torch.ones_like(terms).masked_fill(tracks.trained, decay)
    out = reverse_scan(own, coefficients.masked_fill(~tracks.inner, 0))
    return torch.where(tracks.trained, out, 0)


def next_trained(
    values: Float[Tensor, "batch seq"], tracks: Trajectories
) -> Float[Tensor, "batch seq"]:
    """The value at the next trained token of the same document, 0 if there is none."""
    own = torch.where(tracks.trained, values, 0)
    from_here = reverse_scan(own, (tracks.inner & ~tracks.trained).to(own.dtype))
    return torch.where(tracks.inner, shift_left(from_here), 0)


def reverse_scan(
    terms: Float[Tensor, "batch seq"], coefficients: Float[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    """Solve ``out[j] = terms[j] + coefficients[j] · out[j + 1]`` in log₂(seq) doubling steps.

    A zero coefficient is a wall: nothing crosses it, not even NaN. The alternative, a cumulative sum
    divided by powers of the coefficient, overflows float32 within a few thousand steps.

    Example:
        >>> import torch
        >>> reverse_scan(torch.ones(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.5]]))
        tensor([[1.7500, 1.5000, 1.0000, 1.0000]])

    Source: Blelloch, "Prefix Sums and Their Applications", 1990, section 1.4.
    """
    step = 1
    while step < terms.shape[1]:
        ahead = shift_left(terms, step)
        terms = terms + torch.where(coefficients == 0, 0, coefficients * ahead)
        coefficients = coefficients * shift_left(coefficients, step)
        step *= 2
    return terms


def shift_left(per_token: Tensor, step: int = 1) -> Tensor:
    """Give each token the value of the token ``step`` to its right, 0 (or false) past the end."""
    gone = torch.zeros_like(per_token[:, :step])
    return torch.cat([per_token[:, step:], gone], dim=1)
