"""What a training aims at, with the settings of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lorafa.errors import ConfigError
from lorafa.models.kinds import AUTO, KINDS
from lorafa.registry import Registry
from lorafa.settings.checks import check_flag
from lorafa.settings.groups import OpenGroup
from lorafa.train.objectives import OBJECTIVES
from lorafa.train.objectives.entry import Objective
from lorafa.train.settings.align import AlignConfig
from lorafa.train.settings.model import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(OpenGroup):
    """What is learnt of the rows."""

    group: ClassVar[str] = "objective"
    opens: ClassVar[Mapping[str, str]] = {"name": "own"}
    lines: ClassVar[Mapping[str, Registry[Any]]] = {"name": OBJECTIVES}

    name: str = "sft"
    """sft (learn the answers), or by TRL (pip install lorafa[trl]): dpo, orpo (prefer one of two answers), kto (answers
    judged good or bad), reward (a model that scores answers), grpo (answers of the model itself, by a reward)."""
    dropout: bool = False
    """Train with dropout, that of the model and of the adapter, where the objective is none of sft. What is compared
    with a reference is compared without."""
    own: Any = None
    """The objective's own settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("objective.dropout", self.dropout)

    @property
    def entry(self) -> Objective:
        """The line of the table that is named."""
        return OBJECTIVES.get(self.name)

    @property
    def code(self) -> tuple[str, ...]:
        """The rewards, where one is a function of the user's, which a training runs: module:function."""
        return () if self.entry.code is None else tuple(self.entry.code(self.own))

    def check_beside(self, model: ModelConfig, align: AlignConfig, peft: Any, train: Any) -> None:
        """Raises ConfigError for settings of other groups that an objective of TRL has no use for, or cannot be
        combined with.

        Args:
            peft, train: the settings of these groups (:mod:`lorafa.train.settings.run`).
        """
        name, entry = self.name, self.entry
        if entry.is_own:
            if self.dropout:
                raise ConfigError(
                    f"objective.dropout=true would change nothing: objective={name} trains with dropout anyway "
                    "(peft.lora_dropout). Drop it."
                )
            return
        if align.teaches:
            raise ConfigError(
                f"align={align.name} and objective={name} both say what the model is held close to. A teacher is "
                "beside the loss of answers (objective=sft), and a preference has its reference. Drop one of the two."
            )
        if peft.full:
            raise ConfigError(
                f"objective={name} trains an adapter, and compares it with where it began; with peft.full=true that "
                "would be a second copy of the model. Leave peft.full out."
            )
        if train.packing:
            raise ConfigError(
                f"train.packing=true puts several samples into one row, and objective={name} scores each answer by "
                "itself. Leave it out; train.group_by_length pads little, too."
            )
        if not train.chunked_loss:
            raise ConfigError(
                f"train.chunked_loss=false would change nothing: the loss of objective={name} is TRL's. Leave it out."
            )
        if entry.kind is not None and model.kind not in (AUTO, entry.kind):
            raise ConfigError(
                f"objective={name} trains {KINDS.get(entry.kind).words}, found model.kind={model.kind}. "
                "Leave model.kind out, or take objective=sft."
            )
        if peft.lora_dropout and peft.adapter is None and not self.dropout:
            raise ConfigError(
                f"peft.lora_dropout={peft.lora_dropout:g} would change nothing: objective={name} trains without "
                "dropout, so that a model and its reference are compared by what they have learnt. Leave it out, or "
                "set objective.dropout=true."
            )
        if entry.check is not None:
            entry.check(self.own, train)
        if train.measures and not entry.measures_loss:
            raise ConfigError(
                f"The held-out loss of objective={name} says nothing of how well a model does, and would be measured "
                "on the way (train.eval_every, train.keep_best). Leave these out; rewards are in metrics.jsonl."
            )
