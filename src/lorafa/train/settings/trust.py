"""Whether code of others may run, that of models and functions of the user's: said each time, and taken from no record
that others may have made."""

from __future__ import annotations

from dataclasses import replace

from lorafa.errors import ConfigError
from lorafa.train.settings.align import AlignConfig
from lorafa.train.settings.model import ModelConfig
from lorafa.train.settings.run import RunConfig


def trusting(config: RunConfig, given: RunConfig | None = None) -> RunConfig:
    """The settings with the trust in models' own code that others give; with none where nobody gives any.

    Raises:
        ConfigError: trust is given in a teacher that the settings do not have.
    """
    of_model, of_teacher = (given.model, given.align) if given is not None else (ModelConfig(), AlignConfig())
    return replace(
        config,
        model=replace(config.model, trust_remote_code=of_model.trust_remote_code),
        align=replace(config.align, trust_remote_code=of_teacher.trust_remote_code),
    )


def require_named(config: RunConfig, given: RunConfig | None) -> None:
    """Refuse a record whose functions of the user's nobody has named this time.

    Raises:
        ConfigError: it names some, and others or none are given.
    """
    recorded, named = config.objective.code, () if given is None else given.objective.code
    if recorded and recorded != named:
        names = ",".join(recorded)
        raise ConfigError(
            f"The record names functions as rewards ({names}), and code runs only where it is named each time. If you "
            f"trust it, add to train.resume: objective={config.objective.name} 'objective.reward=[{names}]'."
        )
    if named and recorded != named:
        raise ConfigError(
            f"A continued run keeps its rewards, found objective.reward=[{','.join(named)}] beside train.resume. Leave "
            "it out, or start a new run."
        )
