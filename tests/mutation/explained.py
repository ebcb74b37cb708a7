"""Survivors that no test can kill, or that none should: ``(file, before, after)`` and why."""

from __future__ import annotations


_DIGITS = "for shift in range(bits - 8, -1, -8):"

EXPLAINED: dict[tuple[str, str, str], str] = {
    ("scans", "while step < terms.shape[1]:", "while step <= terms.shape[1]:"): (
        "One doubling more shifts everything out of the row: it adds zeros."
    ),
    ("selection", _DIGITS, "for shift in range(bits + 8, -1, -8):"): (
        "A digit before the first is the sign, or nothing: the order stays, one round is wasted."
    ),
    ("selection", _DIGITS, "for shift in range(bits - 8, -2, -8):"): (
        "The range ends with 0 either way."
    ),
}
