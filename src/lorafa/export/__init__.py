"""Adapters for other programs, by name: what each can read, and how its files are written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.export.entry import Exporter

EXPORTERS: Registry[Exporter] = Registry(
    "export target",
    {
        "peft": "lorafa.export.peft:PEFT",
        "vllm": "lorafa.export.vllm:VLLM",
        "sglang": "lorafa.export.sglang:SGLANG",
        "gguf": "lorafa.export.gguf:GGUF",
        "ollama": "lorafa.export.ollama:OLLAMA",
    },
)
