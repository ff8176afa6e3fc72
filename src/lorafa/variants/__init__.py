"""The formulas of an update, by name."""

from lorafa.registry import Registry
from lorafa.variants.base import Variant

VARIANTS: Registry[type[Variant]] = Registry(
    "variant",
    {
        "lora": "lorafa.variants.lora:LoRA",
        "dora": "lorafa.variants.dora:DoRA",
    },
)
