"""A base of random numbers with adapters that answer otherwise, for chats."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from lorafa import LoraConfig, get_peft_model
from lorafa.chat.speakers import Speaker, Speakers
from toys.adapters import train
from toys.language_models import byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer()
END = int(TOKENIZER.eos_token_id)
SETTINGS: dict[str, dict[str, Any]] = {
    "german": {"target_modules": "all-linear"},
    "french": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
}


def make_speakers(adapters: Collection[str] = tuple(SETTINGS), ends: Collection[int] = (END,)) -> Speakers:
    """The base, called ``tiny``, and adapters that have left their start."""
    model: Any = tiny_llama().eval()
    for number, name in enumerate(adapters):
        config = LoraConfig(r=4, **SETTINGS[name])
        if number == 0:
            model = get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
        model.set_requires_grad([name])
    if adapters:
        torch.manual_seed(7)
        train(model, 0.3)
    names = {"tiny": "__base__", **{name: name for name in adapters}}
    found = {name: Speaker(name, adapter, TOKENIZER, frozenset(ends), 259) for name, adapter in names.items()}
    return Speakers(model.eval(), found, "tiny")
