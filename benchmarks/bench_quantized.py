"""What does a training step on a base of bitsandbytes take beside PEFT's, and what is kept for it beyond the base?

    python benchmarks/bench_quantized.py

Two blocks of SmolLM2-135M's sizes with random weights in bfloat16, all linear layers quantized and adapted (r = 16,
dropout 0.05), 4 rows of 256 tokens, one thread; forward and backward. Bytes are those of storages that autograd holds
after forward, without parameters and without what it holds of the same model frozen, on an input that needs a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from harness import Contender, emit, interleave, median, timed, verdict
from torch import Tensor, nn

NAME = "quantized"
TIME, BYTES = 0.9, 0.5
"""Targets: shares of PEFT's."""


class Step:
    """A model with adapters of one library on one kind of codes."""

    def __init__(self, library: str, way: str) -> None:
        from transformers import LlamaConfig, LlamaModel

        from lorafa.models.quantize import quantize_linears

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=576, intermediate_size=1536, num_hidden_layers=2, num_attention_heads=9,
            num_key_value_heads=3,
        )  # fmt: skip
        base: nn.Module = LlamaModel(config).to(torch.bfloat16).requires_grad_(False).train()
        quantize_linears(base, way)
        self.x = torch.randn(4, 256, 576, dtype=torch.bfloat16)
        self.frozen = self._held(base)
        self.model = adapted_by(library, base)

    def _held(self, model: nn.Module) -> dict[int, int]:
        """Storage -> bytes, of all that is held for backward."""
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        found: dict[int, Tensor] = {}

        def note(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(inputs_embeds=self.x.clone().requires_grad_())
        return {at: t.untyped_storage().nbytes() for at, t in found.items() if at not in own}

    def mib(self) -> float:
        return (sum(self._held(self.model).values()) - sum(self.frozen.values())) / 2**20

    def run(self) -> float:
        return timed(self._step)

    def _step(self) -> None:
        y = self.model(inputs_embeds=self.x.clone().requires_grad_()).last_hidden_state
        y.float().square().mean().backward()
        self.model.zero_grad()


def adapted_by(name: str, base: nn.Module) -> Any:
    import importlib

    library = importlib.import_module(name)
    config = library.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    return library.get_peft_model(base, config).train()


def main() -> None:
    for way in ("bnb4", "bnb8"):
        contenders = [Contender(name, Step, threads=1, library=name, way=way) for name in ("lorafa", "peft")]
        seconds = {name: median(all_) for name, all_ in interleave(contenders, "run", 9, 2).items()}
        kept = {one.name: one("mib") for one in contenders}
        for name in seconds:
            emit(benchmark=NAME, base=way, library=name, seconds=round(seconds[name], 3), kept_mib=round(kept[name], 1))
        verdict(NAME, f"{way}: a step, of PEFT's", seconds["lorafa"] / seconds["peft"], TIME)
        verdict(NAME, f"{way}: bytes kept beyond the base, of PEFT's", kept["lorafa"] / kept["peft"], BYTES)
        for one in contenders:
            one.close()


if __name__ == "__main__":
    main()
