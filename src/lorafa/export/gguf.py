"""llama.cpp, which adds LoRA adapters in GGUF files to a model that runs.

A file has one alpha, and the reader scales each pair by alpha / r with the r of its B (src/llama-adapter.h), so what
other scalings differ by is written into B. Names are those of the base's tensors there, and the rows of B are in the
order in which llama.cpp's conversion of the base has put them: of some architectures it permutes those of q and k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafa.errors import CheckpointError, shorten
from lorafa.export.base import BaseFacts
from lorafa.export.entry import Exporter, in_order, plain_layers_only
from lorafa.export.uniform import rescaled
from lorafa.export.update import PlainAdapter, Update
from lorafa.storage.whole import written_whole

FILE_NAME = "adapter.gguf"


@dataclass(frozen=True)
class Architecture:
    """A kind of model as llama.cpp knows it."""

    name: str
    """general.architecture of its files."""
    permutes: bool = False
    """Whether the conversion of the base permutes the rows of q_proj and k_proj, for another order of rotary pairs."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", permutes=True),
    "MistralForCausalLM": Architecture("llama", permutes=True),
    "MixtralForCausalLM": Architecture("llama", permutes=True),
    "SmolLM3ForCausalLM": Architecture("smollm3", permutes=True),
    "GraniteForCausalLM": Architecture("granite", permutes=True),
    "OlmoForCausalLM": Architecture("olmo", permutes=True),
    "Olmo2ForCausalLM": Architecture("olmo2"),
    "Olmo3ForCausalLM": Architecture("olmo2"),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen2MoeForCausalLM": Architecture("qwen2moe"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe"),
    "GemmaForCausalLM": Architecture("gemma"),
    "Gemma2ForCausalLM": Architecture("gemma2"),
    "Gemma3ForCausalLM": Architecture("gemma3"),
    "PhiForCausalLM": Architecture("phi2"),
    "Phi3ForCausalLM": Architecture("phi3"),
    "GPT2LMHeadModel": Architecture("gpt2"),
    "Starcoder2ForCausalLM": Architecture("starcoder2"),
    "StableLmForCausalLM": Architecture("stablelm"),
    "CohereForCausalLM": Architecture("command-r"),
    "Cohere2ForCausalLM": Architecture("cohere2"),
}
"""Class of transformers -> the architecture. Those whose linear weights the conversion leaves as they are but for the
order of the rows of q and k: others are fused, split or reordered there, and are refused."""

_ADDED = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "output")
"""Tensors of a block, and the head, whose products llama.cpp adds adapters to."""
_TABLE = "token_embd.weight"


class GGUFExporter(Exporter):
    """A LoRA adapter of GGUF: one file, without a base."""

    words = "llama.cpp (GGUF)"
    asks_base = True
    takes_merged = False

    def refusals(self, adapter: PlainAdapter, base: BaseFacts | None) -> Iterator[str]:
        assert base is not None  # asks_base
        yield from plain_layers_only(adapter, self.words, tables=True)
        if base.architecture not in ARCHITECTURES:
            kind = base.architecture or "model whose config names no architecture"
            yield (
                f"the names and the order of rows of a {kind} there are not known here; known are "
                f"{', '.join(sorted(ARCHITECTURES))}"
            )
            return
        names = _names(adapter.updates, base)
        if missing := [path for path, name in names.items() if name is None]:
            architecture = ARCHITECTURES[base.architecture].name
            yield f"a model of architecture {architecture!r} has no tensor there for {shorten(missing, 3)}"
        other = [path for u in adapter.updates if (name := names[path := u.path]) and not _is_added(name, u)]
        if other:
            yield f"it adds no adapter to {shorten((f'{path} ({names[path]})' for path in other), 3)}"
        ends = [u.path for u in adapter.updates if names[u.path] in (_TABLE, "output.weight")]
        if base.tied and ends:
            yield (
                f"embedding and head of this model are one table there, to which it adds no adapter: {shorten(ends, 3)}"
            )
        if ARCHITECTURES[base.architecture].permutes and base.heads == 0:
            yield "the base's config says no number of attention heads, which the order of rows of q and k depends on"

    def write(self, adapter: PlainAdapter, folder: Path, base: BaseFacts | None) -> list[str]:
        assert base is not None
        from gguf import GGUFType, GGUFWriter, Keys

        alpha, updates = at_one_alpha(adapter.updates)
        names = _names(updates, base)
        writer = GGUFWriter(None, ARCHITECTURES[base.architecture].name)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(Path(adapter.source).name)
        for update in updates:
            name = str(names[update.path])
            A, B = update.A.float(), _permuted(update, base, update.B.float())
            # rows of a table are looked up in A, so it lies there the other way round
            writer.add_tensor(f"{name}.lora_a", (A.T if update.is_table else A).contiguous().cpu().numpy())
            writer.add_tensor(f"{name}.lora_b", B.contiguous().cpu().numpy())
        with written_whole(folder / FILE_NAME) as temporary:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        notes = [f"Run it with: llama-cli -m <base>.gguf --lora {FILE_NAME}"]
        scalings = {update.scaling for update in adapter.updates}
        if len(scalings) > 1:
            notes.insert(0, f"Layers are scaled by {len(scalings)} factors; what one alpha does not say is in B.")
        return notes

    def read(self, folder: Path, adapter: PlainAdapter, base: BaseFacts | None) -> list[Update]:
        """By llama.cpp's rule: alpha of the file over the rank that each B has; the order of rows undone."""
        assert base is not None
        from gguf import GGUFReader, Keys

        reader: Any = GGUFReader(folder / FILE_NAME)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        wanted = {"general.type": "adapter", Keys.Adapter.TYPE: "lora"}
        wanted["general.architecture"] = ARCHITECTURES[base.architecture].name
        if wrong := {key: fields.get(key) for key, value in wanted.items() if fields.get(key) != value}:
            raise CheckpointError(f"{folder / FILE_NAME} says {wrong}, where {wanted} was written.")
        # a tensor's dimensions are listed with the fastest first; the data has the shape of numpy
        tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
        names = _names(adapter.updates, base)
        read = []
        for update in adapter.updates:
            A, B = (tensors[f"{names[update.path]}.lora_{factor}"] for factor in "ab")
            A, B = (A.T if update.is_table else A), _permuted(update, base, B, back=True)
            read.append(update.with_factors(A, B, fields[Keys.Adapter.LORA_ALPHA] / B.shape[1]))
        return in_order(read, adapter)


def at_one_alpha(updates: Sequence[Update]) -> tuple[float, list[Update]]:
    """One alpha, and updates whose scaling is alpha / r at the rank that each has: most keep their B as it is."""
    alphas = [update.scaling * update.rank for update in updates]
    alpha = max(set(alphas), key=lambda one: (alphas.count(one), one))
    return alpha, [
        update.with_factors(update.A, rescaled(update.B, own / alpha), alpha / update.rank)
        for update, own in zip(updates, alphas, strict=True)
    ]


def _names(updates: Sequence[Update], base: BaseFacts) -> dict[str, str | None]:
    """Path of a layer -> the name of its weight in the base's file, None where it has none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(kinds[ARCHITECTURES[base.architecture].name], base.layers)
    return {u.path: table.get_name(f"{u.path}.weight", try_suffixes=(".weight",)) for u in updates}


def _is_added(name: str, update: Update) -> bool:
    """Whether llama.cpp adds an adapter to the product with a tensor, or to the rows that are looked up in it."""
    return name == _TABLE if update.is_table else name.split(".")[-2] in _ADDED


def _permuted(update: Update, base: BaseFacts, B: Tensor, *, back: bool = False) -> Tensor:
    """B (out, r) with its rows as the conversion of the base puts those of the weight; ``back`` undoes it.

    transformers rotates the first half of a head's rows with the second, llama.cpp each even row with the odd one after
    it: row (half, i) of a head becomes row (i, half).
    """
    last = update.path.rpartition(".")[2]
    heads = {"q_proj": base.heads, "k_proj": base.kv_heads}.get(last)
    if heads is None or not ARCHITECTURES[base.architecture].permutes:
        return B
    pairs = B.shape[0] // heads // 2
    turned = B.reshape(heads, *((pairs, 2) if back else (2, pairs)), B.shape[1]).transpose(1, 2)
    return turned.reshape(B.shape)


GGUF = GGUFExporter()
