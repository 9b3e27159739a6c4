"""Losses, data and trainers of what this toolkit trains."""
