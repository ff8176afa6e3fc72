"""What a training aims at: answers to learn, answers that are preferred, rewards; one objective a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.train.objectives.entry import Objective

OBJECTIVES: Registry[Objective] = Registry(
    "objective",
    {
        "dpo": "lorafa.train.objectives.dpo:DPO",
        "grpo": "lorafa.train.objectives.grpo:GRPO",
        "kto": "lorafa.train.objectives.kto:KTO",
        "orpo": "lorafa.train.objectives.orpo:ORPO",
        "reward": "lorafa.train.objectives.reward:REWARD",
        "sft": "lorafa.train.objectives.sft:SFT",
    },
)
