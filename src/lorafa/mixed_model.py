"""PEFT's model of several methods, by name."""

from __future__ import annotations

from typing import Any, NoReturn

from lorafa.errors import NotAvailableError

MIXED = (
    "models with adapters of several methods are not available in lorafa, which has LoRA and its variants. Drop "
    "mixed=True and use PeftModel: several LoRA adapters count together by base_model.set_adapter([...])."
)


class PeftMixedModel:
    """PEFT's model with adapters of several methods, by name only: every use of it is refused.

    Raises:
        NotAvailableError: always. Several LoRA adapters go on one PeftModel.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotAvailableError(f"PeftMixedModel: {MIXED}")

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse as the constructor does."""
        raise NotAvailableError(f"PeftMixedModel: {MIXED}")
