"""Tests of `wmtp`: an oracle made of plain loops, and the properties that must hold around it."""
