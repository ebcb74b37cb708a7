"""Mechanical mutants of the mathematics, to see whether our tests would notice."""
