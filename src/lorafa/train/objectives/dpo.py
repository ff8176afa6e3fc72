"""DPO: the better of two answers becomes likelier than a reference has it (Rafailov et al. 2023, arXiv:2305.18290)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafa.data.preferences import PAIRS
from lorafa.errors import ConfigError
from lorafa.settings.checks import check_choice, check_number
from lorafa.train.objectives.entry import Objective

LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm"),
)
"""Losses of pairs, by TRL's names; "sigmoid" is that of the paper."""
SMOOTHED = {"robust": 0.0, "exo_pair": 1e-3}
"""Losses that read ``label_smoothing``, each with what is usual for it."""


@dataclass(frozen=True, kw_only=True)
class DpoSettings:
    """How far the model may go from the reference, and by which loss."""

    beta: float = 0.1
    """What the distance to the reference counts: larger keeps the model closer to it. Of loss_type=ipo it is tau."""
    loss_type: str = "sigmoid"
    """Loss of a pair: sigmoid (the paper's), hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot,
    aot_unpaired, apo_zero, apo_down, discopop, sigmoid_norm."""
    label_smoothing: float | None = None
    """robust: the share of pairs taken to be the wrong way round, in [0, 0.5); exo_pair: its epsilon; null is 0, or
    0.001 for exo_pair. The other losses have none."""

    def __post_init__(self) -> None:
        check_number("objective.beta", self.beta, "a number > 0", 0)
        check_choice("objective.loss_type", self.loss_type, LOSSES)
        if self.label_smoothing is None:
            return
        check_number("objective.label_smoothing", self.label_smoothing, "a number in [0, 0.5)", 0, 0.5, closed="[")
        if self.loss_type not in SMOOTHED:
            raise ConfigError(
                f"objective.label_smoothing={self.label_smoothing} would change nothing: loss_type={self.loss_type} "
                f"does not read it. Take loss_type=robust, or leave it out."
            )
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ConfigError("objective.label_smoothing=0 makes exo_pair infinite. Give 0.001, or leave it out.")

    @property
    def smoothing(self) -> float:
        """The label smoothing, which is settled."""
        return SMOOTHED.get(self.loss_type, 0.0) if self.label_smoothing is None else self.label_smoothing


def _trainer(work: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    own = {
        "beta": work.own.beta,
        "loss_type": [work.own.loss_type],
        "label_smoothing": work.own.smoothing,
        "max_length": None,  # rows are cut already
    }
    return work.build(DPOTrainer, DPOConfig, own, ref_model=work.reference())


DPO = Objective(
    words="direct preference optimization",
    settings=DpoSettings,
    reading=PAIRS,
    kind="causal",
    rows="lorafa.train.objectives.rows:pairs",
    trainer=_trainer,
    measure="lorafa.train.objectives.heldout:preferred",
    metrics={
        "rewards/accuracies": "reward_accuracy",
        "rewards/margins": "reward_margin",
        "rewards/chosen": "reward_chosen",
        "rewards/rejected": "reward_rejected",
    },
    reads_head=True,
)
