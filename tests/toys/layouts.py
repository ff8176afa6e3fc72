"""A small model in float64 whose layers may be fused, files of adapters written by hand, and what they must compute."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorafa import PeftModel
from toys.compare import close

WIDTH, HEADS, KEYS, INNER, WORDS = 8, 8, 4, 6, 11
IDS = torch.tensor([[1, 5, 7, 2, 9, 3], [4, 1, 0, 8, 6, 10]])
LAYERS = {
    "self_attn.q_proj": (HEADS, WIDTH),
    "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
"""A block's linear layers where none is fused, with (out, in)."""
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


class Attention(nn.Module):
    """No attention, but a product of what would be its queries, keys and values."""

    def __init__(self, fused: bool, names: tuple[str, str, str, str]) -> None:
        super().__init__()
        self.names = names
        if fused:
            self.add_module(names[3], nn.Linear(WIDTH, HEADS + 2 * KEYS))
        else:
            for name, rows in zip(names[:3], (HEADS, KEYS, KEYS), strict=True):
                self.add_module(name, nn.Linear(WIDTH, rows))

    def forward(self, x: Tensor) -> Tensor:
        layers = dict(self.named_children())
        if self.names[3] in layers:
            q, k, v = layers[self.names[3]](x).split([HEADS, KEYS, KEYS], dim=-1)
        else:
            q, k, v = (layers[name](x) for name in self.names[:3])
        return q * torch.cat([k.tanh(), v], dim=-1)


class Mlp(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        if fused:
            self.gate_up_proj = nn.Linear(WIDTH, 2 * INNER)
        else:
            self.gate_proj, self.up_proj = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down_proj = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        both = (
            self.gate_up_proj(x)
            if hasattr(self, "gate_up_proj")
            else torch.cat([self.gate_proj(x), self.up_proj(x)], -1)
        )
        gate, up = both.chunk(2, dim=-1)
        return self.down_proj(gate.sigmoid() * up)


class Block(nn.Module):
    def __init__(self, fused: bool, names: tuple[str, str, str, str]) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(fused, names), Mlp(fused)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x)
        return x + self.mlp(x)


class Inner(nn.Module):
    def __init__(self, fused: bool, names: tuple[str, str, str, str]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block(fused, names) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    """Two blocks, named as a Llama's; the same numbers whether its layers are fused or not."""

    def __init__(
        self,
        fused: bool = False,
        *,
        tied: bool = False,
        names: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    ) -> None:
        super().__init__()
        self.model = Inner(fused, names)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.to(torch.float64)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.model(ids))


def pair(out: int, in_: int, rank: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r)."""
    generator = torch.Generator().manual_seed(seed + 17 * out + in_)
    A = torch.randn(rank, in_, generator=generator, dtype=torch.float64)
    return A, torch.randn(out, rank, generator=generator, dtype=torch.float64)


def pairs(names: Mapping[str, tuple[int, int]] | None = None, rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every named layer of both blocks, each with numbers of its own, by the layers' full names."""
    found = {}
    for block in range(2):
        for i, (name, (out, in_)) in enumerate((names or LAYERS).items()):
            found[f"model.layers.{block}.{name}"] = pair(out, in_, rank, seed=100 * block + i)
    return found


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    name: str = "adapter_model.safetensors",
    header: Mapping[str, str] | None = None,
) -> Path:
    """A folder with a file of tensors and, where one is given, a config."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.clone().contiguous() for key, tensor in tensors.items()},
        folder / name,
        metadata=dict(header or {}),
    )
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def peft_config(*targets: str, **settings: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": list(targets), **settings}


def peft_file(
    factors: Mapping[str, tuple[Tensor, Tensor]], before: str = "base_model.model.", inside: str = ""
) -> dict[str, Tensor]:
    """The tensors by PEFT's names.

    Args:
        inside: what stands between ``lora_A`` and ``weight``.
    """
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"{before}{name}.lora_A{inside}.weight"] = A
        tensors[f"{before}{name}.lora_B{inside}.weight"] = B
    return tensors


def by_hand(base: nn.Module, updates: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with matrices added to weights, by the names of layers or of parameters."""
    model = copy.deepcopy(base)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, update in updates.items():
            parameters[name if name in parameters else f"{name}.weight"].add_(update)
    return model


def updates(factors: Mapping[str, tuple[Tensor, Tensor]], scaling: float) -> dict[str, Tensor]:
    return {name: scaling * B @ A for name, (A, B) in factors.items()}


def assert_loads(base: nn.Module, folder: Path, expected: nn.Module, inputs: Tensor = IDS, **options: Any) -> PeftModel:
    """The file gives the outputs of a model that was changed by hand, and so does what is saved of it again."""
    original = copy.deepcopy(base)
    model = PeftModel.from_pretrained(base, folder, **options)
    with torch.no_grad():
        wanted = expected(inputs)
        close(model(inputs), wanted)
        assert not torch.equal(wanted, original(inputs)), "the file has to change something"
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            close(PeftModel.from_pretrained(original, saved)(inputs), wanted)
    return model


class ImageBlock(nn.Module):
    """A convolution, two projections as diffusers names them, and a 1x1 convolution that may be a linear layer."""

    def __init__(self, linear: bool, width: int) -> None:
        super().__init__()
        self.linear = linear
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.proj_in: nn.Module = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.attn1 = nn.Module()
        self.attn1.to_q, self.attn1.to_out = nn.Linear(width, width), nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, width, height, breadth)."""
        y = self.conv1(x).tanh()
        flat = y.permute(0, 2, 3, 1)
        y = self.proj_in(flat) if self.linear else self.proj_in(y).permute(0, 2, 3, 1)
        y = self.attn1.to_out[0](self.attn1.to_q(y).tanh())
        return x + y.permute(0, 3, 1, 2)


class Unet(nn.Module):
    """Two blocks of an image model, in float64."""

    def __init__(self, linear: bool = False, width: int = 4) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(ImageBlock(linear, width) for _ in range(2))
        self.to(torch.float64)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.down_blocks:
            x = block(x)
        return x


def image(width: int = 4) -> Tensor:
    return torch.randn(2, width, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
