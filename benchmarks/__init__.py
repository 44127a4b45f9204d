"""Measurements on top of the engine of `python -m maskops bench`."""
