"""ORPO: answers are learnt, and the better made likelier, without a reference (Hong et al. 2024, arXiv:2403.07691)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafa.data.preferences import PAIRS
from lorafa.settings.checks import check_number
from lorafa.train.objectives.entry import Objective


@dataclass(frozen=True, kw_only=True)
class OrpoSettings:
    """What the preference counts beside the loss of the better answer."""

    beta: float = 0.1
    """Weight of the log odds ratio, lambda of the paper, beside the loss of prompt and better answer."""

    def __post_init__(self) -> None:
        check_number("objective.beta", self.beta, "a number > 0", 0)


def _trainer(work: Any) -> Any:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    own = {"beta": work.own.beta, "max_length": work.config.data.max_length}
    return work.build(ORPOTrainer, ORPOConfig, own, parts=_Pairs)


class _Pairs:
    """The rows of a run as TRL's trainer of ORPO has them once it has tokenized its own."""

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """The ids of both answers behind their prompt, labelled where the answer is."""
        prompt = feature["prompt_ids"]
        row = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
        for which in ("chosen", "rejected"):
            answer = feature[f"{which}_ids"]
            row[f"{which}_input_ids"] = [*prompt, *answer]
            row[f"{which}_attention_mask"] = [1] * (len(prompt) + len(answer))
            row[f"{which}_labels"] = [-100] * len(prompt) + answer
        return row

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        read = [inputs[f"{which}_attention_mask"].sum().item() for which in ("chosen", "rejected")]
        self.state.num_input_tokens_seen += int(sum(read))  # type: ignore[attr-defined]


ORPO = Objective(
    words="odds ratio preference optimization",
    settings=OrpoSettings,
    reading=PAIRS,
    kind="causal",
    rows="lorafa.train.objectives.rows:pairs",
    trainer=_trainer,
    measure="lorafa.train.objectives.heldout:preferred",
    metrics={
        "rewards/accuracies": "reward_accuracy",
        "rewards/margins": "reward_margin",
        "nll_loss": "nll",
        "log_odds_ratio": "log_odds_ratio",
    },
)
