"""The option of commands without settings that lets a model bring code of its own."""

from __future__ import annotations

import argparse


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Give a command ``--trust-remote-code``."""
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="run code that comes with the base model (auto_map); without it such a model is refused",
    )  # fmt: skip
