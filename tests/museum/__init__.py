"""Bugs that others have had, planted in our own code to see whether our tests would notice."""
