"""Supervised fine-tuning: the answers of the rows are learnt, by our own trainer."""

from __future__ import annotations

from lorafa.train.objectives.entry import Objective

SFT = Objective(words="supervised fine-tuning")
