"""Documented features that this version does not have: asked for, they are refused by name."""

from __future__ import annotations

from lorafa.config import LoraConfig
from lorafa.errors import NotAvailableError
from lorafa.variants import switches
from lorafa.version import VERSION

# What this version does not have yet: the fields that ask for it, and its name. A line is deleted when its field is
# read; a variant's when the variant declares the field as its switch.
_LATER_FIELDS = {
    "megatron_config": "LoRA on Megatron's parallel layers",
}


def unavailable(config: LoraConfig) -> list[str]:
    """The documented features the config asks for and this version does not have, as "QA-LoRA (use_qalora=True)"."""
    built = switches()
    asked = [
        f"{feature} ({name}={getattr(config, name)!r})"
        for name, feature in _LATER_FIELDS.items()
        if getattr(config, name) and name not in built
    ]
    return asked


def require_available(config: LoraConfig) -> None:
    """Refuse a config this version cannot carry out in full.

    Raises:
        NotAvailableError: names every such feature and the field that asks for it.
    """
    asked = unavailable(config)
    if asked:
        raise NotAvailableError(
            f"{' and '.join(asked)} {'is' if len(asked) == 1 else 'are'} not available yet in lorafa {VERSION}; "
            "nothing was changed. Leave the field at its default to go on without it."
        )
