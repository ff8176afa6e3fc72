"""Files of diffusers: names of three ages, several models in one file, alphas in the header or beside the tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lorafa import PeftModel
from lorafa.errors import CheckpointError, ConfigError, SourceError
from toys.compare import close, refused
from toys.layouts import Unet, assert_loads, by_hand, image, pair, write

FILE = "pytorch_lora_weights.safetensors"
NAMES = ("attn1.to_q", "attn1.to_out.0")


def factors(rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    return {f"down_blocks.{i}.{name}": pair(4, 4, rank, 10 * i + j) for i in range(2) for j, name in enumerate(NAMES)}


def changed(found: dict[str, tuple[Tensor, Tensor]], scaling: float = 1.0) -> nn.Module:
    return by_hand(Unet(), {name: scaling * B @ A for name, (A, B) in found.items()})


def named(found: dict[str, tuple[Tensor, Tensor]], age: str, before: str = "unet.") -> dict[str, Tensor]:
    tensors = {}
    for name, (A, B) in found.items():
        owner, _, leaf = name.rpartition("attn1.")
        old = leaf.removesuffix(".0")
        one, other = {
            "peft": (f"{name}.lora_A.weight", f"{name}.lora_B.weight"),
            "down": (f"{name}.lora.down.weight", f"{name}.lora.up.weight"),
            "linear layer": (f"{name}.lora_linear_layer.down.weight", f"{name}.lora_linear_layer.up.weight"),
            "processor": tuple(f"{owner}attn1.processor.{old}_lora.{end}.weight" for end in ("down", "up")),
        }[age]
        tensors[before + one], tensors[before + other] = A, B
    return tensors


@pytest.mark.parametrize("before", ["unet.", "transformer.", "", "base_model.model."])
@pytest.mark.parametrize("age", ["peft", "down", "linear layer", "processor"])
def test_names_of_every_age_are_read(tmp_path: Path, age: str, before: str) -> None:
    folder = write(tmp_path, named(factors(), age, before), name=FILE)
    assert_loads(Unet(), folder, changed(factors()), image())


def test_alphas_beside_the_tensors_count(tmp_path: Path) -> None:
    tensors = named(factors(), "down")
    tensors |= {f"unet.{name}.alpha": torch.tensor(6.0) for name in factors()}
    assert_loads(Unet(), write(tmp_path, tensors, name=FILE), changed(factors(), 3.0), image())


@pytest.mark.parametrize("before", ["unet.", ""])
def test_the_header_says_rank_and_alpha(tmp_path: Path, before: str) -> None:
    """As since diffusers 0.34, by ``save_lora_weights`` and ``save_lora_adapter``."""
    said: dict[str, Any] = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {"to_q": 12}}
    header = {"lora_adapter_metadata": json.dumps({before + key: value for key, value in said.items()})}
    found = factors(4)
    updates = {n: (3.0 if "to_q" in n else 2.0) * B @ A for n, (A, B) in found.items()}
    folder = write(tmp_path, named(found, "peft", before), name=FILE, header=header)
    assert_loads(Unet(), folder, by_hand(Unet(), updates), image())


def test_settings_of_the_header_are_read_strictly(tmp_path: Path) -> None:
    base = Unet()
    header = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.use_newlora": True})}
    folder = write(tmp_path, named(factors(), "peft"), name=FILE, header=header)
    with refused(base, ConfigError, "lora_adapter_metadata in its header: The config sets use_newlora=True"):
        PeftModel.from_pretrained(base, folder)
    folder = write(tmp_path, named(factors(), "peft"), name=FILE, header={"lora_adapter_metadata": "{"})
    with refused(base, CheckpointError, "lora_adapter_metadata in its header is no json of settings"):
        PeftModel.from_pretrained(base, folder)


def test_ranks_may_differ(tmp_path: Path) -> None:
    found = factors() | {n: p for n, p in factors(3).items() if "blocks.1" in n}
    assert_loads(Unet(), write(tmp_path, named(found, "peft"), name=FILE), changed(found), image())


def test_other_models_of_the_pipeline_are_named(tmp_path: Path) -> None:
    names = [f"text_encoder.layers.{i}.fc1.lora_linear_layer" for i in range(3)]
    text = {f"{name}.{end}.weight": torch.ones(2, 2) for name in names for end in ("up", "down")}
    folder = write(tmp_path, named(factors(), "peft") | text, name=FILE)
    with pytest.warns(UserWarning, match=r"which were not loaded: text_encoder \(3 layers\). Load the file on those"):
        assert_loads(Unet(), folder, changed(factors()), image())


def test_a_model_outside_the_pipeline_is_refused(tmp_path: Path) -> None:
    folder, base = write(tmp_path, named(factors(), "peft"), name=FILE), nn.Sequential(nn.Linear(4, 4))
    with refused(base, CheckpointError, "fits this model; of unet, which is nearest, the model lacks 4 of"):
        PeftModel.from_pretrained(base, folder)
    wide = Unet(width=6)
    with refused(wide, CheckpointError, "which is nearest, its layers have other widths here"):
        PeftModel.from_pretrained(wide, folder)


@pytest.mark.parametrize("written_by", ["diffusers", "kohya"])
def test_a_text_encoder_of_transformers(tmp_path: Path, written_by: str) -> None:
    """transformers 5 has the layers of CLIP's text encoder one level higher than the files say."""
    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=8, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.CLIPTextModel(config).double().eval()
    tensors, updates = {}, {}
    for i in range(2):
        A, B = pair(8, 8, 2, i)
        old = f"text_model.encoder.layers.{i}.self_attn.q_proj"
        place = next(name for name, _ in base.named_modules() if name.endswith(f"layers.{i}.self_attn.q_proj"))
        updates[place] = B @ A
        if written_by == "diffusers":
            tensors |= {f"text_encoder.{old}.lora_A.weight": A, f"text_encoder.{old}.lora_B.weight": B}
        else:
            key = f"lora_te_{old.replace('.', '_')}"
            tensors |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B, f"{key}.alpha": torch.tensor(2.0)}
    folder = write(tmp_path, tensors, name=FILE)
    expected, ids = by_hand(base, updates), torch.tensor([[1, 5, 7, 2]])
    model = PeftModel.from_pretrained(base, folder)
    with torch.no_grad():
        close(model(input_ids=ids).last_hidden_state, expected(input_ids=ids).last_hidden_state, 1e-9)


def test_the_oldest_names_of_a_text_encoder_are_read(tmp_path: Path) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "out_proj": nn.Linear(4, 4)}).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.self_attn["out_proj"](self.self_attn["q_proj"](x).tanh())

    q, out = pair(4, 4, 2, 1), pair(4, 4, 2, 2)
    before = "text_encoder.self_attn."
    tensors = {f"{before}to_q_lora.down.weight": q[0], f"{before}to_q_lora.up.weight": q[1]}
    tensors |= {f"{before}to_out_lora.down.weight": out[0], f"{before}to_out_lora.up.weight": out[1]}
    base = Text()
    expected = by_hand(base, {"self_attn.q_proj": q[1] @ q[0], "self_attn.out_proj": out[1] @ out[0]})
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_loads(base, write(tmp_path, tensors, name=FILE), expected, x)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        ({"unet.conv_in.weight": torch.ones(3)}, "1 tensors that are no A or B and would be ignored: unet.conv_in"),
        ({"unet.down_blocks.9.alpha": torch.ones(())}, "alphas of layers it has no A of: down_blocks.9"),
        ({"unet.down_blocks.0.attn1.to_q.alpha": torch.ones(())}, "3 of 4 layers have no alpha, and the others have"),
        ({"unet.down_blocks.0.attn1.to_q.lora_A.weight": torch.ones(())}, r"to_q has A \(\) and B \(4, 2\)"),
        ({"unet.down_blocks.0.conv1.lora_A.weight": torch.ones(2, 4, 3, 3)}, "conv1 has no lora_B.weight"),
    ],
)
def test_what_is_not_of_the_layout_is_refused(tmp_path: Path, extra: dict[str, Tensor], text: str) -> None:
    folder, base = write(tmp_path, named(factors(), "peft") | extra, name=FILE), Unet()
    with refused(base, CheckpointError, text):
        PeftModel.from_pretrained(base, folder)


def test_pickles_of_diffusers_are_read_on_request_only(tmp_path: Path) -> None:
    torch.save(named(factors(), "processor", ""), tmp_path / "pytorch_lora_weights.bin")
    base = Unet()
    with refused(base, CheckpointError, "opening a pickle can run any code"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_loads(Unet(), tmp_path, changed(factors()), image(), allow_pickle=True)
    with refused(base, SourceError, "has no adapter_config.json"):
        PeftModel.from_pretrained(base, tmp_path, use_safetensors=True)
