"""Files of models whose parts another version has elsewhere: images and text before and after transformers 4.52."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from lorafa import PeftModel
from lorafa.errors import CheckpointError
from toys.compare import close, refused
from toys.language_models import SMALL
from toys.layouts import IDS, WIDTH, Inner, assert_loads, by_hand, pair, peft_config, peft_file, updates, write


def llava() -> nn.Module:
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**SMALL), image_token_index=31
    )
    return transformers.LlavaForConditionalGeneration(config).double().eval()


def qwen2_vl() -> nn.Module:
    torch.manual_seed(0)
    text = SMALL | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    )
    return transformers.Qwen2VLForConditionalGeneration(config).double().eval()


FC1 = "model.vision_tower.encoder.layers.0.mlp.fc1"
IDS_OF_TEXT = torch.tensor([[1, 5, 7, 2, 9, 3], [4, 1, 0, 8, 6, 2]])


@pytest.mark.parametrize(
    ("model", "old", "new"),
    [
        (llava, "language_model.model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"),
        (llava, "language_model.lm_head", "lm_head"),
        (qwen2_vl, "model.layers.1.self_attn.q_proj", "model.language_model.layers.1.self_attn.q_proj"),
    ],
)
def test_text_parts_of_models_of_images_and_text(tmp_path: Path, model: type[nn.Module], old: str, new: str) -> None:
    base = model()
    weight = base.get_submodule(new).weight
    factors = {old: pair(weight.shape[0], weight.shape[1])}  # type: ignore[index, union-attr]
    folder = write(tmp_path, peft_file(factors), peft_config(old))
    expected = by_hand(base, {new: updates(factors, 3.0)[old]})
    loaded = PeftModel.from_pretrained(model(), folder)
    with torch.no_grad():
        close(loaded(input_ids=IDS_OF_TEXT).logits, expected(input_ids=IDS_OF_TEXT).logits, 1e-9)
    assert not torch.equal(loaded(input_ids=IDS_OF_TEXT).logits, base(input_ids=IDS_OF_TEXT).logits)


@pytest.mark.parametrize(
    ("model", "old", "new"),
    [
        (llava, "multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        (llava, "vision_tower.vision_model.encoder.layers.0.mlp.fc1", FC1),
        (qwen2_vl, "visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
    ],
)
def test_image_parts_are_found(tmp_path: Path, model: type[nn.Module], old: str, new: str) -> None:
    base = model()
    weight = base.get_submodule(new).weight
    factors = {old: pair(weight.shape[0], weight.shape[1])}  # type: ignore[index, union-attr]
    folder = write(tmp_path, peft_file(factors), peft_config(old.rpartition(".")[2]))
    layer = PeftModel.from_pretrained(base, folder).base_model.model.get_submodule(new)
    A, B = factors[old]
    close(layer.get_delta_weight("default"), 3.0 * B @ A)  # type: ignore[operator]


def test_layers_that_a_file_has_lost_are_named(tmp_path: Path) -> None:
    name = "layers.0.self_attn.q_proj"
    folder = write(tmp_path, peft_file({f"model.language_model.{name}": pair(8, WIDTH)}), peft_config("q_proj"))
    base = Older()
    with refused(base, CheckpointError, "no tensors of language_model.model.layers.1.self_attn.q_proj, which target"):
        PeftModel.from_pretrained(base, folder)


def test_a_regular_expression_of_the_old_names_becomes_the_new_layers(tmp_path: Path) -> None:
    base = llava()
    factors = {f"language_model.model.layers.{i}.self_attn.v_proj": pair(8, 16, seed=i) for i in range(2)}
    config = peft_config() | {"target_modules": r"language_model\.model\.layers\.\d+\.self_attn\.v_proj"}
    config |= {"rank_pattern": {}, "alpha_pattern": {"language_model.model.layers.1.self_attn.v_proj": 2}}
    loaded = PeftModel.from_pretrained(base, write(tmp_path, peft_file(factors), config))
    for i, scaling in enumerate((3.0, 1.0)):
        layer = loaded.base_model.model.get_submodule(f"model.language_model.layers.{i}.self_attn.v_proj")
        A, B = factors[f"language_model.model.layers.{i}.self_attn.v_proj"]
        close(layer.get_delta_weight("default"), scaling * B @ A)  # type: ignore[operator]


def test_whole_modules_move_too(tmp_path: Path) -> None:
    base = llava()
    old, new = "language_model.model.layers.0.self_attn.q_proj", "model.language_model.layers.0.self_attn.q_proj"
    factors, head = {old: pair(16, 16)}, torch.randn(32, 16, dtype=torch.float64)
    tensors = peft_file(factors) | {"base_model.model.language_model.lm_head.weight": head}
    config = peft_config("q_proj", modules_to_save=["language_model.lm_head"], layers_to_transform=[0])
    expected = by_hand(base, {new: updates(factors, 3.0)[old]})
    expected.lm_head.weight.data = head
    loaded = PeftModel.from_pretrained(llava(), write(tmp_path, tensors, config))
    with torch.no_grad():
        close(loaded(input_ids=IDS_OF_TEXT).logits, expected(input_ids=IDS_OF_TEXT).logits, 1e-9)


class Older(nn.Module):
    """A model of someone else that has its parts where transformers had them."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.model = Inner(False, ("q_proj", "k_proj", "v_proj", "qkv_proj"))
        generator = torch.Generator().manual_seed(3)
        self.to(torch.float64)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.language_model.model(ids)  # type: ignore[operator]


def test_new_names_are_found_in_an_older_model(tmp_path: Path) -> None:
    name = "layers.0.self_attn.q_proj"
    factors = {f"model.language_model.{name}": pair(8, WIDTH)}
    expected = {f"language_model.model.{name}": updates(factors, 3.0)[f"model.language_model.{name}"]}
    folder = write(tmp_path, peft_file(factors), peft_config("layers.0.self_attn.q_proj"))
    assert_loads(Older(), folder, by_hand(Older(), expected), IDS)


def test_moved_layers_are_fused_as_well(tmp_path: Path) -> None:
    name = "layers.0.self_attn"
    A, B = pair(16, WIDTH)
    folder = write(tmp_path, peft_file({f"model.language_model.{name}.qkv_proj": (A, B)}), peft_config("qkv_proj"))
    parts = zip(("q_proj", "k_proj", "v_proj"), (3.0 * B @ A).split([8, 4, 4]), strict=True)
    expected = {f"language_model.model.{name}.{part}": rows for part, rows in parts}
    assert_loads(Older(), folder, by_hand(Older(), expected), IDS)


def test_one_layer_under_two_names_is_refused(tmp_path: Path) -> None:
    name = "layers.0.self_attn.q_proj"
    factors = {f"model.language_model.{name}": pair(8, WIDTH), f"language_model.model.{name}": pair(8, WIDTH)}
    folder, base = write(tmp_path, peft_file(factors), peft_config("q_proj")), Older()
    with refused(base, CheckpointError, "under two names, of two versions of the model"):
        PeftModel.from_pretrained(base, folder)


def test_a_name_that_may_be_two_layers_is_refused(tmp_path: Path) -> None:
    base = Older()
    base.model = Inner(False, ("q_proj", "k_proj", "v_proj", "qkv_proj")).double()
    factors = {"model.language_model.layers.0.self_attn.q_proj": pair(8, WIDTH)}
    config = peft_config() | {"target_modules": r"model\.layers\.0\.self_attn\.q_proj"}
    folder = write(tmp_path, peft_file(factors), config)
    with refused(
        base, CheckpointError, r"may be 'language_model.model.layers.* or 'model.layers.*Say which by key_map"
    ):
        PeftModel.from_pretrained(base, folder)
    expected = by_hand(base, {"model.layers.0.self_attn.q_proj": updates(factors, 3.0).popitem()[1]})
    mapping = {r"^model\.language_model\.": "model."}
    loaded = PeftModel.from_pretrained(base, folder, key_mapping=mapping)
    close(loaded.base_model.model.model(IDS), expected.model(IDS))  # type: ignore[operator]


class Stack(nn.Module):
    """Experts in one parameter (E, out, in), added up."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(3, 6, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->bo", self.gate_up_proj, x)


class OlderMixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        self.language_model.model.experts = Stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.language_model.model.experts(x)  # type: ignore[operator, union-attr]


def test_ranks_of_bare_parameters_go_with_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3 * 5, 4, generator=generator, dtype=torch.float64)
    B = torch.randn(6, 5 * 3, generator=generator, dtype=torch.float64)
    config = peft_config() | {
        "target_parameters": ["experts.gate_up_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 5, "nowhere": 3},
        "alpha_pattern": {"gate_up_proj": 10},
    }
    folder = write(tmp_path, peft_file({"model.language_model.experts": (A, B)}), config)
    update = 2.0 * torch.einsum("ore,eri->eoi", B.view(6, 5, 3), A.view(3, 5, 4))
    expected = by_hand(OlderMixture(), {"language_model.model.experts.gate_up_proj": update})
    x = torch.randn(2, 4, dtype=torch.float64)
    model = assert_loads(OlderMixture(), folder, expected, x)
    assert model.peft_config["default"].rank_pattern == {r".*\.gate_up_proj": 5}
