"""Whether code that comes with models may run: said each time, and taken from no record that others may have made."""

from __future__ import annotations

from dataclasses import replace

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
