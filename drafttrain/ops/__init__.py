"""The floor everybody stands on: attention, caches, sampling and random draws."""
