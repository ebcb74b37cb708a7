"""Survivors that no test can kill, or that none should: ``(file, before, after)`` and why."""

from __future__ import annotations


EXPLAINED: dict[tuple[str, str, str], str] = {}
