"""A base model in files and an adapter of it, and what merging them in memory gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from toys.adapters import initializer_of, stats_for, train

SHARD = "4KB"
"""So small that toys have several shards."""
TARGETS = ["q_proj", "down_proj"]
"""Layers of a Llama, for starts that read statistics."""
Make = Callable[[], nn.Module]


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder by name."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def config_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def assert_same_files(one: Path, other: Path) -> None:
    """The same names, shapes, dtypes and bits of tensors, and the same config."""
    a, b = tensors_in(one), tensors_in(other)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name
    assert config_in(one) == config_in(other)


@dataclass(frozen=True)
class Place:
    """Folders of a base model, of adapters on it, and of what comes of both."""

    folder: Path
    kind: type[Any]
    prepare: Callable[[Any], Any] = lambda model: model
    """What is done to the base before an adapter is put on it."""

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def out(self) -> Path:
        return self.folder / "merged"

    def loaded(self) -> Any:
        return self.prepare(self.kind.from_pretrained(self.base, dtype="auto"))

    def add_adapter(self, name: str = "adapter", seed: int = 1, **settings: Any) -> Path:
        """Train an adapter on the base and save it."""
        base, config = self.loaded(), LoraConfig(**{"r": 4, "init_seed": seed} | settings)
        stats = None
        if initializer_of(config.init_lora_weights).needs:
            named = ((path, module) for path, module in base.named_modules() if path.endswith(tuple(TARGETS)))
            stats = {path: stats_for(module.weight.float()) for path, module in named}
        model = get_peft_model(base, config, stats=stats)
        torch.manual_seed(seed)
        train(model)
        model.save_pretrained(self.folder / name)
        return self.folder / name

    def merged_in_memory(self) -> Path:
        """The folder of what ``merge_and_unload`` and ``save_pretrained`` give."""
        folder = self.folder / "in memory"
        model = PeftModel.from_pretrained(self.loaded(), self.adapter)
        model.merge_and_unload().save_pretrained(folder, max_shard_size=SHARD)  # type: ignore[operator]
        return folder


def place(
    folder: Path,
    make: Make,
    *,
    dtype: torch.dtype = torch.bfloat16,
    prepare: Callable[[Any], Any] = lambda model: model,
    **settings: Any,
) -> Place:
    """A base in several shards with an adapter; without settings there is no adapter."""
    model: Any = make().to(dtype)
    made = Place(folder, type(model), prepare)
    model.save_pretrained(made.base, max_shard_size=SHARD)
    if settings:
        made.add_adapter(**settings)
    return made
