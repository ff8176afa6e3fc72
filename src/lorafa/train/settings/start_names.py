"""Names of starts that are the runner's own: for the default, and those of other documents and scripts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lorafa.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NamedStart:
    """A name of ``init.mode``, and the start it stands for."""

    start: Callable[[Any], bool | str]
    """Own settings -> the value of ``init_lora_weights``."""
    settings: type[Any] | None = None
    """A frozen dataclass of its own settings; None takes those of the start."""
    translated: Callable[[Any], dict[str, Any]] | None = None
    """From its own settings to those of the start, where the two differ."""


@dataclass(frozen=True, kw_only=True)
class GradientSettings:
    """The start from the gradient of the first training rows, by the names LoRA-One's scripts and others use."""

    direction: Literal["LoRA-One", "LoRA-FA", "ArB2r", "A2rBr", "ArBr", "random"] = "LoRA-One"
    """LoRA-One (LoRA-FA is another name for it), or one of LoRA-GA's."""
    scale: Literal["stable", "gd", "unit", "weightS", "gd_scale", "weight_svd"] | None = None
    """How large the start is; null takes the method's own."""
    stable_gamma: float | Literal["auto"] | None = None
    """gamma of scale stable; auto (LoRA-One only) tries six on rows the statistics have not seen."""
    normalize: Literal["layer", "global", "none"] | None = None
    """LoRA-One: what singular values are divided by."""
    norm_clip: bool = False
    """LoRA-GA: shrink A and B where an entry of s B A is larger than the largest of the weight."""

    def __post_init__(self) -> None:
        if self.norm_clip and self.is_one_step:
            raise ConfigError(
                f"norm_clip would change nothing: it limits what is taken out of the base, and direction="
                f"{self.direction} takes nothing. Drop it."
            )
        if self.normalize is not None and not self.is_one_step:
            raise ConfigError(
                f"normalize={self.normalize} is LoRA-One's, and direction={self.direction} is LoRA-GA's. Drop one of "
                "the two."
            )
        if self.scale not in (None, "stable") and self.stable_gamma is not None:
            raise ConfigError(
                f"stable_gamma={self.stable_gamma} would change nothing: it is the gamma of scale=stable, and scale is "
                f"{self.scale}. Drop it."
            )

    @property
    def is_one_step(self) -> bool:
        return self.direction in ("LoRA-One", "LoRA-FA")


_LORA_GA_SCALES = {"gd": "gd_scale", "weightS": "weight_svd"}
"""Scales of LoRA-GA by their names in its authors' scripts -> PEFT's."""


def _of_gradient(settings: GradientSettings) -> dict[str, Any]:
    given: dict[str, Any] = {"stable_gamma": settings.stable_gamma}
    if settings.is_one_step:
        given |= {"scale": settings.scale, "normalize": settings.normalize}
    else:
        scale = _LORA_GA_SCALES.get(settings.scale or "", settings.scale)
        given |= {"scale": scale, "direction": settings.direction}
    return {name: value for name, value in given.items() if value is not None}


DEFAULT = NamedStart(start=lambda settings: True)
SVD = NamedStart(start=lambda settings: "pissa")
GRADIENT = NamedStart(
    start=lambda settings: (
        "lora_one"
        if settings is None or settings.is_one_step
        else "lora_ga_clipped"
        if settings.norm_clip
        else "lora_ga"
    ),
    settings=GradientSettings,
    translated=_of_gradient,
)
