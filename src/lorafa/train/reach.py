"""Whether an adapter that counts only from some place of a row on counts in the rows it is to be trained on."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from lorafa.adapter import Variant
from lorafa.data.chat import Sample
from lorafa.errors import ConfigError, DataError
from lorafa.peft_model import PeftModel
from lorafa.surgery.walk import lora_layers


def check_reach(model: PeftModel, samples: Sequence[Sample], console: Console, *, packed: bool) -> None:
    """Say in how many of the samples the adapter counts, where its formula depends on what is in them.

    Raises:
        DataError: it counts in none, so that nothing would be trained.
        ConfigError: samples share rows (``packed``), of which such a formula sees one.
    """
    found = _reader(model)
    if found is None:
        return
    layer, variant = found
    asked = next((one.switch for one in variant.chain() if one.reads_call and one.switch), variant.name)
    setting = f"peft.{asked}={getattr(model.active_peft_config, asked, None)!r}"
    if packed:
        raise ConfigError(
            f"train.packing=true puts several samples into a row, and {setting} goes by one place a row (layer "
            f"{layer!r}). Leave train.packing out; train.group_by_length pads little, too."
        )
    counts = sum(variant.counts_in(sample.input_ids) for sample in samples)
    if not counts:
        raise DataError(
            f"{setting} is in none of the {len(samples):,} samples to train on, so the adapter (layer {layer!r} and "
            "the others) would not be trained at all. Put the invocation into the rows, and give the tokens that this "
            "tokenizer makes of it there: a text is often cut otherwise beside other text than alone."
        )
    if counts < len(samples):
        console.print(
            f"The adapter counts in {counts:,} of the {len(samples):,} samples; the others have no {asked} in them and "
            "train nothing.",
            highlight=False,
        )


def _reader(model: PeftModel) -> tuple[str, Variant] | None:
    """The first layer whose formula has to know something of each call, by its name, and the formula."""
    for name, layer in lora_layers(model):
        for adapter in layer.counting():
            if adapter.variant.reads_call:
                return name, adapter.variant
    return None
