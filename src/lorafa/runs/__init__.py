"""A run is a directory: what was asked, where it ran, what was measured, what came out."""

from __future__ import annotations

CONFIG = "config.yaml"
"""The file of all settings, by which a directory is known to be that of a run."""
