"""Files of kohya's sd-scripts: layers by names with underscores, alphas as tensors, convolutions, LyCORIS' DoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel
from lorafa.errors import CheckpointError
from toys.compare import refused
from toys.layouts import LAYERS, Model, Unet, assert_loads, by_hand, image, pairs, updates, write

FILE = "style.safetensors"


def kohya_file(
    factors: dict[str, tuple[Tensor, Tensor]], before: str = "lora_unet_", alpha: float | None = 6.0
) -> dict[str, Tensor]:
    tensors = {}
    for name, (A, B) in factors.items():
        key = before + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = A, B
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def image_factors(*names: str, width: int = 4) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors of convolutions and linear layers of both blocks of the image model."""
    factors = {}
    generator = torch.Generator().manual_seed(9)
    kernels = {"conv1": (3, 3), "proj_in": (1, 1)}
    for block in range(2):
        for name in names or ("conv1", "proj_in", "attn1.to_q", "attn1.to_out.0"):
            A = torch.randn(2, width, *kernels.get(name, ()), generator=generator, dtype=torch.float64)
            B = torch.randn(width, 2, *([1, 1] if name in kernels else []), generator=generator, dtype=torch.float64)
            factors[f"down_blocks.{block}.{name}"] = (A, B)
    return factors


def image_updates(factors: dict[str, tuple[Tensor, Tensor]], scaling: float, base: nn.Module) -> dict[str, Tensor]:
    """B A of each layer, of a convolution by kernel: sum over r of B[o, r] A[r, i, :, :]."""
    return {
        name: scaling * (B.flatten(1) @ A.flatten(1)).view_as(base.get_parameter(f"{name}.weight"))
        for name, (A, B) in factors.items()
    }


@pytest.mark.parametrize("linear", [False, True], ids=["convolution 1x1", "linear"])
def test_an_image_model(tmp_path: Path, linear: bool) -> None:
    factors, base = image_factors(), Unet(linear)
    folder = write(tmp_path, kohya_file(factors), name=FILE)
    assert_loads(Unet(linear), folder / FILE, by_hand(base, image_updates(factors, 3.0, base)), image())


def test_the_file_of_a_folder_is_named(tmp_path: Path) -> None:
    factors, base = image_factors(), Unet()
    folder = write(tmp_path, kohya_file(factors), name=FILE)
    expected = by_hand(base, image_updates(factors, 3.0, base))
    assert_loads(Unet(), folder, expected, image(), weight_name=FILE)


def test_without_an_alpha_the_update_is_not_scaled(tmp_path: Path) -> None:
    factors, base = image_factors(), Unet()
    folder = write(tmp_path, kohya_file(factors, alpha=None), name=FILE)
    assert_loads(Unet(), folder / FILE, by_hand(base, image_updates(factors, 1.0, base)), image())


def test_each_layer_has_the_rank_and_the_alpha_it_has(tmp_path: Path) -> None:
    factors = pairs() | {n: p for n, p in pairs(LAYERS, 3).items() if "layers.1" in n}
    tensors = kohya_file({n.removeprefix("model."): p for n, p in factors.items()}, "lora_te_model_")
    tensors["lora_te_model_layers_0_mlp_up_proj.alpha"] = torch.tensor(2.0)
    expected = {n: (6 / len(A)) * B @ A for n, (A, B) in factors.items()}
    expected["model.layers.0.mlp.up_proj"] /= 3
    assert_loads(Model(), write(tmp_path, tensors, name=FILE) / FILE, by_hand(Model(), expected))


def test_a_file_of_two_models_says_what_it_leaves_out(tmp_path: Path) -> None:
    factors, base = image_factors(), Unet()
    text = kohya_file({n.removeprefix("model."): p for n, p in pairs().items()}, "lora_te_model_")
    folder = write(tmp_path, kohya_file(factors) | text, name=FILE)
    with pytest.warns(UserWarning, match=r"other models of the pipeline, which were not loaded: lora_te \(12 layers\)"):
        assert_loads(Unet(), folder / FILE, by_hand(base, image_updates(factors, 3.0, base)), image())
    with pytest.warns(UserWarning, match=r"which were not loaded: lora_unet \(8 layers\)"):
        assert_loads(Model(), folder / FILE, by_hand(Model(), updates(pairs(), 3.0)))


def test_models_of_the_same_names_are_told_apart_by_their_widths(tmp_path: Path) -> None:
    small, large = image_factors(), image_factors(width=6)
    folder = write(tmp_path, kohya_file(small, "lora_te1_") | kohya_file(large, "lora_te2_"), name=FILE)
    for width, factors in ((4, small), (6, large)):
        base = Unet(width=width)
        expected = by_hand(base, image_updates(factors, 3.0, base))
        with pytest.warns(UserWarning, match="which were not loaded: lora_te"):
            assert_loads(Unet(width=width), folder / FILE, expected, image(width))
    folder = write(tmp_path, kohya_file(small, "lora_te1_") | kohya_file(small, "lora_te2_"), name=FILE)
    base = Unet()
    with refused(base, CheckpointError, "adapters for lora_te1 and lora_te2, and all of them fit this model"):
        PeftModel.from_pretrained(base, folder / FILE)


def test_a_text_encoder_that_has_lost_its_text_model_is_found(tmp_path: Path) -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Unet()

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x)

    factors, base = image_factors("attn1.to_q"), Text()
    tensors = kohya_file(factors, "lora_te_text_model_encoder_")
    expected = {f"encoder.{n}": u for n, u in image_updates(factors, 3.0, base.encoder).items()}
    assert_loads(Text(), write(tmp_path, tensors, name=FILE) / FILE, by_hand(base, expected), image())


def test_norms_of_outputs_are_those_of_dora(tmp_path: Path) -> None:
    factors, base = image_factors("conv1", "attn1.to_q"), Unet()
    tensors, expected = kohya_file(factors), {}
    for name, update in image_updates(factors, 3.0, base).items():
        weight = base.get_parameter(f"{name}.weight").detach()
        shape = (4, *[1] * (weight.dim() - 1))
        norms = torch.rand(shape, dtype=torch.float64) + 1
        tensors[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = norms
        moved = weight + update
        expected[name] = norms * moved / moved.flatten(1).norm(dim=1).view(shape) - weight
    assert_loads(Unet(), write(tmp_path, tensors, name=FILE) / FILE, by_hand(base, expected), image())


@pytest.mark.parametrize(
    ("key", "shape", "text"),
    [
        ("x.hada_w1_a", (2, 4), "LoHa: its update is a product of two low-rank matrices"),
        ("x.lokr_w1", (2, 4), "LoKr: its update is a Kronecker product"),
        ("x.lora_mid.weight", (2, 2, 3, 3), "LoCon with a core between A and B"),
        ("x.oft_blocks", (2, 2, 2), "OFT: its update is a rotation"),
        ("x.diff_b", (4,), "whole differences of weights"),
        ("x.norm_of_it", (4,), "norm_of_it is no part of it: known are lora_down.weight"),
        ("down_blocks_0_attn1_to_q.dora_scale", (1, 4), "one norm for each input, as LyCORIS makes them"),
        ("input_blocks_4_1_proj_in.lora_down.weight", (2, 4), "names of the original code of the model"),
        ("double_blocks_0_img_attn_qkv.lora_down.weight", (2, 4), "names of the original code of the model"),
        ("down_blocks_7_attn1_to_q.lora_down.weight", (2, 4), "the model lacks 1 of its 9 layers: down_blocks_7"),
    ],
)
def test_what_is_no_adapter_of_kohya_is_refused(tmp_path: Path, key: str, shape: tuple[int, ...], text: str) -> None:
    tensors = kohya_file(image_factors()) | {f"lora_unet_{key}": torch.ones(shape)}
    folder, base = write(tmp_path, tensors, name=FILE), Unet()
    with refused(base, CheckpointError, text):
        PeftModel.from_pretrained(base, folder / FILE)


@pytest.mark.parametrize("key", ["alpha", "lora_down.weight", "lora_up.weight"])
def test_a_part_of_no_layer_is_refused(tmp_path: Path, key: str) -> None:
    folder, base = write(tmp_path, kohya_file(image_factors()) | {key: torch.ones(1)}, name=FILE), Unet()
    with refused(base, CheckpointError, rf"sd-scripts, and {key} is no part of it: known are .*, each behind lora_"):
        PeftModel.from_pretrained(base, folder / FILE)


@pytest.mark.parametrize(
    ("key", "tensor", "text"),
    [
        ("lora_down.weight", torch.tensor(1.0), r"has A \(\) and B \(4, 2\), which are no \(r, in\) and \(out, r\)"),
        ("lora_up.weight", torch.ones(4, 3), r"has A \(2, 4\) and B \(4, 3\), which are no"),
        ("alpha", torch.ones(3), r"the alpha of down_blocks.0.attn1.to_q has to be one number.* found a tensor \(3,\)"),
        ("alpha", torch.tensor(-1.0), r"0 or more, found a tensor \(\) of -1.0"),
        ("alpha", None, "1 of 8 layers have no alpha, and the others have one: down_blocks.0.attn1.to_q"),
    ],
)
def test_damaged_tensors_are_refused(tmp_path: Path, key: str, tensor: Tensor | None, text: str) -> None:
    tensors = kohya_file(image_factors())
    name = f"lora_unet_down_blocks_0_attn1_to_q.{key}"
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    folder, base = write(tmp_path, tensors, name=FILE), Unet()
    with refused(base, CheckpointError, text):
        PeftModel.from_pretrained(base, folder / FILE)


def test_half_a_layer_is_refused(tmp_path: Path) -> None:
    tensors = kohya_file(image_factors())
    del tensors["lora_unet_down_blocks_0_attn1_to_q.lora_up.weight"]
    folder, base = write(tmp_path, tensors, name=FILE), Unet()
    with refused(base, CheckpointError, r"down_blocks.0.attn1.to_q has no lora_up.weight"):
        PeftModel.from_pretrained(base, folder / FILE)


def test_names_that_underscores_make_one_are_refused(tmp_path: Path) -> None:
    base = nn.Sequential()
    base.add_module("a_b", nn.Linear(4, 4))
    base.add_module("a", nn.Sequential())
    base.get_submodule("a").add_module("b", nn.Linear(4, 4))
    folder = write(tmp_path, {"lora_unet_a_b.lora_down.weight": torch.ones(2, 4)}, name=FILE)
    with refused(base, CheckpointError, r"the model's 'a_b' and 'a.b' are one then"):
        PeftModel.from_pretrained(base, folder / FILE)


# ---- no layout


def test_a_file_of_no_layout_is_refused_with_the_nearest(tmp_path: Path) -> None:
    folder, base = write(tmp_path, {"a.lora_dwn.weight": torch.ones(2)}, name=FILE), Unet()
    with refused(base, CheckpointError, r"is in no layout that lorafa knows: .* 'lora_dwn' looks like 'lora_down'"):
        PeftModel.from_pretrained(base, folder / FILE)
    folder = write(tmp_path, {"a.weight": torch.ones(2)}, name=FILE)
    with refused(base, CheckpointError, r"its tensors are called a.weight. Known are those of diffusers; kohya"):
        PeftModel.from_pretrained(base, folder / FILE)


def test_a_file_with_the_marks_of_two_layouts_is_refused(tmp_path: Path) -> None:
    tensors = kohya_file(image_factors()) | {"unet.down_blocks.0.attn1.to_q.lora.up.weight": torch.ones(4, 2)}
    folder, base = write(tmp_path, tensors, name=FILE), Unet()
    with refused(base, CheckpointError, r"may be in two layouts: it has the marks of diffusers \('unet.* and kohya"):
        PeftModel.from_pretrained(base, folder / FILE)


def test_a_config_that_is_given_beside_kohyas_file_is_refused(tmp_path: Path) -> None:
    folder, base = write(tmp_path, kohya_file(image_factors()), name=FILE), Unet()
    with refused(base, CheckpointError, "may be in two layouts"):
        PeftModel.from_pretrained(base, folder / FILE, config=LoraConfig(r=2, target_modules=["to_q"]))
