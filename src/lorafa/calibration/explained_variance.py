"""EVA's rule for ranks: the principal directions of the inputs that explain most, over all layers together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafa.calibration.ranking import Asked, Layer, Rule
from lorafa.errors import CalibrationError, ConfigError, warn
from lorafa.settings.checks import check_number


@dataclass(frozen=True)
class ExplainedVarianceSettings:
    """What rule "explained_variance" is set by."""

    rho: float = 2.0
    """How many times its rank a layer may get, rounded."""

    def __post_init__(self) -> None:
        check_number("rho", self.rho, "a number >= 1", 1.0, closed="[")


RHO = ExplainedVarianceSettings.rho


def most_components(rho: float, rank: int) -> int:
    """round(rho r): how many of its input's principal components EVA follows for a layer, and may give it."""
    return round(rho * rank)


def variance_shares(S: Tensor, total: Tensor) -> Tensor:
    """sigma_i^2 / total, (k,): the share of the variance of a layer's input that each principal direction holds.

    0 where the input does not vary; nan where it is not finite.
    """
    return S.square() / total.clamp(min=torch.finfo(S.dtype).tiny)


def by_explained_variance(ratios: Mapping[str, Tensor], ranks: Mapping[str, int], rho: float) -> dict[str, int]:
    """EVA's ranks (Paischer et al. 2024, arXiv:2410.07170, section 3.3): the components that explain most anywhere.

    Args:
        ratios: (k,) of each layer, :func:`variance_shares`, falling. Of equal components, as layers with one input have
            them, those of the layer that comes first here count first.
        ranks: of each layer before, the sum of which is shared out.
        rho: no layer gets more than :func:`most_components`. A layer may get 0; what explains nothing gets none.
    """
    worth = [
        (-float(value), index, name)
        for name, values in ratios.items()
        for index, value in enumerate(values[: most_components(rho, ranks[name])])
        if value > 0
    ]
    found = dict.fromkeys(ranks, 0)
    worth.sort(key=lambda one: one[:2])  # without the name: a stable sort leaves equals in the layers' order
    for *_, name in worth[: sum(ranks.values())]:
        found[name] += 1
    return found


def _ratios(layer: Layer, settings: ExplainedVarianceSettings) -> Tensor:
    if "principal.singular_values" not in layer.tensors:
        raise CalibrationError(
            f"There are no principal directions of the input of {layer.name!r} to choose a rank by. Collect statistics "
            "with also=['principal'], or use another rule."
        )
    held, rho = len(layer.tensors["principal.singular_values"]), settings.rho
    wanted = min(most_components(rho, layer.rank), layer.shape[1])
    if held < wanted:
        raise CalibrationError(
            f"'explained_variance' with rho={rho:g} chooses among the first {wanted} principal directions of the input "
            f"of {layer.name!r}, and its statistics hold {held}: round(rho r), with the rho of EvaConfig where that is "
            "the start's and 2 otherwise. Set the same rho in the rule and in EvaConfig, or collect with a larger r."
        )
    shares = variance_shares(layer.tensors["principal.singular_values"], layer.tensors["principal.total_variance"])
    return shares[: layer.most]


def _all_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


def _explained_variance(asked: Asked) -> dict[str, int]:
    """Warns where there were fewer directions than the config has ranks; raises where there were none."""
    before = {name: layer.rank for name, layer in asked.layers.items()}
    ranks = by_explained_variance(asked.measured, before, asked.settings.rho)
    given, wanted = sum(ranks.values()), sum(before.values())
    if not given:
        raise ConfigError("Every layer would get rank 0: the statistics see no direction at all. Use more data.")
    if given < wanted:
        warn(
            f"The data has {given} principal directions for the {wanted} ranks of the config: the adapter is smaller "
            "than it says. Use more data."
        )
    return ranks


def _require_same_rho(settings: ExplainedVarianceSettings, collecting: Mapping[str, Any], of_start: Any) -> None:
    rho = getattr(of_start, "rho", RHO)
    if settings.rho > rho:
        raise ConfigError(
            f"RankRule('explained_variance') with rho={settings.rho:g} chooses among more directions than are "
            f"collected, those of rho={rho:g}: of EvaConfig with EVA, {RHO:g} otherwise. Set the same rho in both."
        )


EXPLAINED_VARIANCE = Rule(
    choose=_explained_variance,
    measure=_ratios,
    is_finite=_all_finite,
    also="principal",
    of="input",
    unbounded="it gives a layer 0 to round(rho r) ranks, and rho bounds them from above",
    settings=ExplainedVarianceSettings,
    check=_require_same_rho,
)
