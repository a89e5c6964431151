"""Oracles and helpers for tests. `puna.testing.reference` is the architecture written out literally: slow, and meant to
be read."""
