"""KTO: answers that were judged good become likelier, others less (Ethayarajh et al. 2024, arXiv:2402.01306)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorafa.data.preferences import JUDGED
from lorafa.errors import ConfigError
from lorafa.settings.checks import check_choice, check_number
from lorafa.train.objectives.entry import Objective

LOSSES = ("kto", "apo_zero_unpaired")


@dataclass(frozen=True, kw_only=True)
class KtoSettings:
    """How far the model may go from the reference, and what good and bad answers weigh."""

    beta: float = 0.1
    """What the distance to the reference counts: larger keeps the model closer to it."""
    loss_type: str = "kto"
    """kto, which holds each answer against others of its batch (train.batch_size of 2 and more), or apo_zero_unpaired,
    which does not."""
    desirable_weight: float = 1.0
    """What good answers weigh; where there are fewer of them, more of it makes up for that."""
    undesirable_weight: float = 1.0
    """What bad answers weigh."""

    def __post_init__(self) -> None:
        check_number("objective.beta", self.beta, "a number > 0", 0)
        check_choice("objective.loss_type", self.loss_type, LOSSES)
        for name in ("desirable_weight", "undesirable_weight"):
            check_number(f"objective.{name}", getattr(self, name), "a number >= 0", 0, closed="[")
        if not self.desirable_weight and not self.undesirable_weight:
            raise ConfigError("objective.desirable_weight and objective.undesirable_weight are both 0. Raise one.")

    @property
    def against_others(self) -> bool:
        """Whether answers are held against others of their batch."""
        return self.loss_type == "kto"


def _check(own: KtoSettings, train: Any) -> None:
    if own.against_others and train.batch_size < 2:
        raise ConfigError(
            "objective=kto holds each answer against others of its batch, and train.batch_size=1 has none. Set 2 or "
            "more, or objective.loss_type=apo_zero_unpaired."
        )


def _trainer(work: Any) -> Any:
    from trl import KTOConfig, KTOTrainer

    own, size = work.own, work.config.train.batch_size
    if own.against_others:
        rows = work.rows
        work.rows = replace(rows, train=with_others(rows.train, size), heldout=with_others(rows.heldout, size))
    told = {
        "beta": own.beta,
        "loss_type": own.loss_type,
        "desirable_weight": own.desirable_weight,
        "undesirable_weight": own.undesirable_weight,
        "max_length": None,  # rows are cut already
        "train_sampling_strategy": "sequential",  # the others of a batch are those it was made with
    }
    return work.build(KTOTrainer, KTOConfig, told, ref_model=work.reference())


def with_others(rows: Sequence[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Each row of a batch of so many with the answer of the one before it in the batch, of the first with the last's:
    what the KL of the loss is estimated by."""
    found = []
    for at in range(0, len(rows), size):
        batch = rows[at : at + size]
        answers = [row["completion_ids"] for row in batch]
        found += [
            {**row, "KL_completion_ids": other} for row, other in zip(batch, [answers[-1], *answers[:-1]], strict=True)
        ]
    return found


KTO = Objective(
    words="Kahneman-Tversky optimization",
    settings=KtoSettings,
    reading=JUDGED,
    kind="causal",
    rows="lorafa.train.objectives.rows:judged",
    trainer=_trainer,
    check=_check,
    measure="lorafa.train.objectives.heldout:by_verdict",
    metrics={
        "kl": "kl",
        "rewards/margins": "reward_margin",
        "rewards/chosen": "reward_chosen",
        "rewards/rejected": "reward_rejected",
    },
    by_length=False,
    reads_head=True,
)
