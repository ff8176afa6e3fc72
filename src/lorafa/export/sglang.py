"""SGLang, which serves adapters from PEFT's files and scales all layers by lora_alpha / r, rsLoRA or not.

It knows the linear layers of attention and MLP by their names, and reads ``target_modules`` as a list of them, not as
an expression (python/sglang/srt/lora/lora.py, lora_config.py and utils.py; docs/exporting.md has the commits).
"""

from __future__ import annotations

from collections.abc import Iterator

from lorafa.errors import shorten
from lorafa.export.base import BaseFacts
from lorafa.export.uniform import Uniform
from lorafa.export.update import PlainAdapter

LAYERS = frozenset({
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "fused_qkv_a_proj_with_mqa"),
    "lm_head",
})  # fmt: skip
"""Last names of the layers it puts adapters on."""


class _SGLang(Uniform):
    words = "SGLang"
    tables = False

    def refusals(self, adapter: PlainAdapter, base: BaseFacts | None) -> Iterator[str]:
        yield from super().refusals(adapter, base)
        other = [u.path for u in adapter.updates if u.is_linear and u.path.rpartition(".")[2] not in LAYERS]
        if other:
            yield f"it puts adapters on layers of these names only, {', '.join(sorted(LAYERS))}: {shorten(other, 3)}"

    def start_with(self, rank: int) -> str:
        return (
            f"Start it with: python -m sglang.launch_server --model-path <base> --enable-lora --max-lora-rank {rank} "
            "--lora-paths <name>=<folder>"
        )


SGLANG = _SGLang()
