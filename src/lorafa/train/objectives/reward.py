"""A reward model: one score of an answer, higher for the better of two (Ouyang et al. 2022, arXiv:2203.02155)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorafa.data.preferences import PAIRS
from lorafa.settings.checks import check_number
from lorafa.train.objectives.entry import Objective


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """What else the scores are to be."""

    center: float = 0.0
    """Weight of (score of the better + score of the worse answer)^2, which keeps scores around 0; 0.01 is usual."""

    def __post_init__(self) -> None:
        check_number("objective.center", self.center, "a number >= 0", 0, closed="[")


def _trainer(work: Any) -> Any:
    from trl import RewardConfig, RewardTrainer

    own = {"center_rewards_coefficient": work.own.center or None, "max_length": None}  # rows are cut already
    work.rows = replace(work.rows, train=_whole(work.rows.train), heldout=_whole(work.rows.heldout))
    return work.build(RewardTrainer, RewardConfig, own)


def _whole(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as TRL's trainer of rewards reads them: prompt and answer in one."""
    return [
        {f"{which}_ids": row["prompt_ids"] + row[f"{which}_ids"] for which in ("chosen", "rejected")}
        | {"length": row["length"]}
        for row in rows
    ]


REWARD = Objective(
    words="reward modelling",
    settings=RewardSettings,
    reading=PAIRS,
    kind="reward",
    loads_as="reward",
    rows="lorafa.train.objectives.rows:pairs",
    trainer=_trainer,
    measure="lorafa.train.objectives.heldout:scored",
    metrics={
        "accuracy": "reward_accuracy",
        "margin": "reward_margin",
        "mean_reward": "reward_mean",
        "min_reward": "reward_min",
        "max_reward": "reward_max",
    },
    answers=False,
)
