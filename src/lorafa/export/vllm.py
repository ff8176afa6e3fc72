"""vLLM, which serves adapters from PEFT's files: LoRA on linear layers, one r and one lora_alpha for all of them.

It refuses ``modules_to_save`` and DoRA, and reads no ``rank_pattern`` and no ``alpha_pattern``
(vllm/lora/peft_helper.py and lora_model.py). The rank is at most what ``--max-lora-rank`` allows, which is one of a
list (vllm/config/lora.py). Adapters on embedding tables are for models that declare them; others refuse to load.
"""

from __future__ import annotations

from lorafa.export.uniform import Uniform

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` takes."""


class _VLLM(Uniform):
    words = "vLLM"
    largest_rank = RANKS[-1]

    def start_with(self, rank: int) -> str:
        fits = next(one for one in RANKS if one >= rank)
        return f"Start it with: vllm serve <base> --enable-lora --max-lora-rank {fits} --lora-modules <name>=<folder>"


VLLM = _VLLM()
