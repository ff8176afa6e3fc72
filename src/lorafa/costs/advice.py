"""What to set where nothing is known of a task but its model: each recommendation with its reason and what it rests on.

Rules of thumb, and the measurements of this project beside them: on one model, SmolLM2-135M, in short trainings. Where
a document says other numbers than were measured, the recommendation says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafa.initializers.base import Initializer
from lorafa.optimizers import OPTIMIZERS
from lorafa.train.settings.init import start_of
from lorafa.train.settings.optim import entry_of
from lorafa.train.settings.run import RunConfig

BY_SIZE = (
    (1e9, (4, 8), (16, 32), 0.05),
    (7e9, (8, 16), (32, 64), 0.05),
    (13e9, (16, 32), (64, 64), 0.1),
    (math.inf, (32, 32), (64, 64), 0.1),
)
"""Below so many parameters: ranks from and to, alphas from and to, dropout. A rule of thumb of published guides, which
give no measurement for it."""
SMALLEST_RANK = 16
"""The rank at which the rates of this project were swept on the optimizers; smaller ones were not compared."""
ALPHA_OF_RANK = 2
"""alpha / r in all measurements of this project."""
EXPONENTS: Mapping[str, float] = {"llama": 0.78, "qwen2": 0.08, "qwen2_moe": 0.08, "qwen3": 0.08, "qwen3_moe": 0.08}
"""How fast the best rate falls with the width, by the model type of a config; known for these families."""
BAND = 4.0
"""The best rate lies within this factor of the centre."""
SHORT = 200
"""Below so many steps a training wants the upper half of the band: ours had 40 to 80."""
LARGE_FACTORS = (8, 16)
"""Starts that take something out of the base had best rates smaller by these factors (docs/starts.md)."""
FULL = 2e-5
"""The rate of ``peft=full_ft``, which was not swept."""
OF_DOCUMENTS = (1e-4, 5e-4)
"""The rates that the same guides recommend for every model."""


@dataclass(frozen=True)
class Advice:
    """One recommendation."""

    setting: str
    """The setting it is for: ``peft.r``."""
    value: float | int | str
    reason: str
    low: float | None = None
    high: float | None = None
    """The band of values worth trying, where there is one."""
    against: str | None = None
    """What a document says otherwise."""

    @property
    def words(self) -> str:
        """As it is written behind `lorafa train`."""
        return f"{self.setting}={self.value:g}" if isinstance(self.value, float) else f"{self.setting}={self.value}"


@dataclass(frozen=True)
class Facts:
    """What recommendations go by."""

    parameters: int
    hidden: int | None
    """Width of the model."""
    family: str
    """The ``model_type`` of its config."""
    adapted: float | None = None
    """Share of the base parameters in layers that all-linear adapts."""
    steps: int | None = None
    """Optimizer steps of the training; None where they are not known."""


def facts_of(model: Any, parameters: int, adapted: float | None = None, steps: int | None = None) -> Facts:
    """The facts of a model of transformers, which may be without weights."""
    text = model.config.get_text_config()
    return Facts(parameters, getattr(text, "hidden_size", None), str(text.model_type), adapted, steps)


def advise(facts: Facts, config: RunConfig) -> list[Advice]:
    """Recommendations for a run: rank, alpha, dropout, targets, start, optimizer, a band of rates for the start and the
    optimizer that the settings name, and what is not known of the batch."""
    start = start_of(config.init).initializer
    if config.peft.full:
        return [_rate(facts, config, start)]
    ranks, alphas, dropout = row_of(facts.parameters)
    return [
        _rank(facts, ranks),
        _alpha(facts, alphas),
        _dropout(start, dropout),
        _targets(facts),
        Advice(
            "init",
            "default",
            "A random, B zero: exact at step 0 and reads no data. functional and lora_one read a gradient and were "
            "ahead by 0.011 and 0.006 nats a token; starts that take something out of the base were behind on every "
            "seed (docs/starts.md).",
        ),
        Advice(
            "optim",
            "adamw",
            "lora_plus was the one better than it, by 0.009 nats a token, at a rate of its own; lora_fa takes less "
            "memory for 0.017 more (docs/optimizers.md).",
        ),
        _rate(facts, config, start),
        Advice(
            "train.batch_size",
            config.train.batch_size,
            "The run's own: the batch was not swept here. Large ones hurt LoRA more than a training of all weights, "
            "and leads of PiSSA and MiLoRA vanished once it was tuned (arXiv:2602.09492). Sweep it together with the "
            "rate.",
        ),
    ]


def row_of(parameters: int) -> tuple[tuple[int, int], tuple[int, int], float]:
    """Ranks, alphas and dropout of the table by size."""
    return next(row for below, *row in BY_SIZE if parameters < below)  # type: ignore[return-value]


def rank_of(parameters: int) -> int:
    """The recommended rank."""
    return max(SMALLEST_RANK, row_of(parameters)[0][1])


def _rank(facts: Facts, ranks: tuple[int, int]) -> Advice:
    value, above = rank_of(facts.parameters), facts.parameters
    reason = f"The end of the rule of thumb for {above:,} parameters, {ranks[0]} to {ranks[1]}."
    against = None
    if value > ranks[1]:
        reason = (
            f"The smallest at which rates were swept here on all linear layers (docs/optimizers.md); for {above:,} "
            "parameters it costs little. Smaller and larger ones were not compared."
        )
        against = f"published guides say {ranks[0]} to {ranks[1]} for a model of this size, without a measurement"
    return Advice("peft.r", value, reason, ranks[0], max(value, 4 * ranks[0]), against)


def _alpha(facts: Facts, alphas: tuple[int, int]) -> Advice:
    value = ALPHA_OF_RANK * rank_of(facts.parameters)
    inside = alphas[0] <= value <= alphas[1]
    reason = "Twice the rank, as in all measurements here; other ratios were not compared"
    return Advice(
        "peft.lora_alpha",
        value,
        f"{reason}. {'Within' if inside else 'Beside'} the {alphas[0]} to {alphas[1]} of published guides.",
        alphas[0],
        alphas[1],
    )


def _dropout(start: Initializer, dropout: float) -> Advice:
    if start.moves_base and start.variant is None:
        return Advice(
            "peft.lora_dropout",
            0.0,
            "The start takes a part of the base into A and B, of which dropout takes away as well: 0.794 nats a token "
            "with 0.05, 0.755 without (docs/how-to-choose.md).",
            against=f"published guides say {dropout:g} for a model of this size, whatever the start",
        )
    return Advice("peft.lora_dropout", dropout, "That of published guides for a model of this size; not compared here.")


def _targets(facts: Facts) -> Advice:
    covered = "" if facts.adapted is None else f" They hold {facts.adapted:.0%} of this model's parameters."
    return Advice(
        "peft.target_modules",
        "all-linear",
        f"All linear layers but the head, as in all runs here; fewer were not compared.{covered}",
        against="the example of published guides adapts q_proj and v_proj alone",
    )


def band(facts: Facts) -> tuple[float, float, float] | None:
    """The lowest, middle and highest rate for AdamW on A and B: 5e-4 (2000 / width)^P, and a factor of 4 to each side.

    P is known for Llama-like and Qwen-like models from a sweep over 35 of them; for others both stand for the
    ends of what may be. None where the config says no width.
    """
    if not facts.hidden:
        return None
    known = EXPONENTS.get(facts.family)
    powers = sorted({*EXPONENTS.values()}) if known is None else [known]
    centres = sorted(5e-4 * (2000 / facts.hidden) ** power for power in powers)
    middle = math.exp(sum(map(math.log, centres)) / len(centres))
    return centres[0] / BAND, middle, centres[-1] * BAND


def _rate(facts: Facts, config: RunConfig, start: Initializer) -> Advice:
    entry = entry_of(config.optim)
    if config.peft.full:
        return Advice(
            "optim.lr", FULL, "That of peft=full_ft for all weights; it was not swept, and the rule for A and B does "
            "not hold."
        )  # fmt: skip
    found = band(facts)
    if found is None or not entry.adam_like:
        why = (
            "its config says no width"
            if found is None
            else f"the rule is of Adam-like steps, not of {config.optim.name}"
        )
        return Advice("optim.lr", entry.lr, f"The optimizer's own; there is no rule: {why}. Sweep it.")
    low, middle, high = found
    ratio = entry.lr / OPTIMIZERS.get("adamw").lr
    least, most = LARGE_FACTORS if start.moves_base and start.variant is None else (1, 1)
    low, middle, high = low * ratio / most, middle * ratio / math.sqrt(least * most), high * ratio / least
    value = _round(middle * (2 if _is_short(facts) else 1))
    return Advice("optim.lr", value, _of_rate(facts, ratio, (least, most)), low, high, _against(low, high))


def _of_rate(facts: Facts, ratio: float, factors: Sequence[int]) -> str:
    known = facts.family in EXPONENTS
    power = f"P = {EXPONENTS[facts.family]:g}" if known else "P is not known for this family: from 0.08 to 0.78"
    parts = [f"5e-4 (2000 / {facts.hidden})^P for a {facts.family} model, {power}; a factor of 4 to each side"]
    if _is_short(facts):
        parts.append(f"short trainings want the upper half (here {facts.steps} steps)")
    if ratio != 1:
        parts.append(f"this optimizer's rate is {ratio:g} times AdamW's")
    if factors[0] > 1:
        parts.append(f"starts with large factors want {factors[0]} to {factors[1]} times less")
    return "; ".join(parts) + "."


def _against(low: float, high: float) -> str | None:
    from_, to = OF_DOCUMENTS
    measured = "4e-3 was best of 1e-3 to 8e-3 on SmolLM2-135M in 75 steps (docs/optimizers.md)"
    if low <= from_ and to <= high:
        return None
    where = "below" if to < low else "above" if from_ > high else "in part outside"
    return f"published guides say {from_:g} to {to:g} for every model, {where} this band; {measured}"


def _is_short(facts: Facts) -> bool:
    return facts.steps is not None and facts.steps < SHORT


def _round(value: float) -> float:
    """The nearest of 1, 2 and 5 times a power of ten, by ratio."""
    power = math.floor(math.log10(value))
    steps = [digit * 10.0**exponent for exponent in (power, power + 1) for digit in (1, 2, 5)]
    return float(f"{min(steps, key=lambda step: abs(math.log(step / value))):.0e}")
