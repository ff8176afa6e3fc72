"""Options of commands that write answers: how long these are, and what is drawn."""

from __future__ import annotations

import argparse


def add_drawing(parser: argparse.ArgumentParser, seed: str) -> None:
    """Add the options.

    Args:
        seed: what is drawn from where no seed is given, for the help.
    """
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the likeliest token"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest tokens of this probability"
    )
    parser.add_argument("--seed", type=int, metavar="N", help=f"of what is drawn (default: {seed})")
