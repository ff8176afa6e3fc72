"""A file that does not fit is refused in full: what is missing, unexpected or misshapen, and the likely cause."""

from __future__ import annotations

import pytest
import torch

from lorafa.errors import CheckpointError
from lorafa.io.strict import compare

PREFIX = "base_model.model."


def adapter(layers: int = 2, rank: int = 4, width: int = 8, prefix: str = PREFIX) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of an adapter on the query and value layers of a small model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        for module in ("q_proj", "v_proj"):
            path = f"{prefix}model.layers.{i}.self_attn.{module}"
            shapes |= {f"{path}.lora_A.weight": (rank, width), f"{path}.lora_B.weight": (width, rank)}
    return shapes


def refusal(have: dict[str, tuple[int, ...]], want: dict[str, tuple[int, ...]]) -> str:
    with pytest.raises(CheckpointError) as caught:
        compare(have, want).raise_if_any("dir/adapter_model.safetensors", "default")
    text = str(caught.value)
    assert text.startswith("dir/adapter_model.safetensors does not fit adapter 'default'.\n")
    assert text.endswith("\nNothing was loaded.")
    return text


def renamed(shapes: dict[str, tuple[int, ...]], old: str, new: str) -> dict[str, tuple[int, ...]]:
    return {key.replace(old, new, 1): shape for key, shape in shapes.items()}


def test_a_file_that_fits_raises_nothing_whether_given_as_tensors_or_shapes():
    tensors = {key: torch.zeros(shape) for key, shape in adapter().items()}
    for misfit in (compare(tensors, adapter()), compare(adapter(), tensors), compare({}, {})):
        assert not misfit
        misfit.raise_if_any("file", "default")


def test_the_three_kinds_of_misfit_are_listed_with_their_counts_and_shapes():
    have = {"a.lora_A.weight": (4, 8), "b.lora_A.weight": (4, 8), "c.lora_A.weight": (4, 9)}
    want = {"a.lora_A.weight": (4, 8), "x.lora_A.weight": (4, 8), "c.lora_A.weight": (4, 8)}
    misfit = compare(have, want)
    assert misfit.missing == ["x.lora_A.weight"]
    assert misfit.unexpected == ["b.lora_A.weight"]
    assert misfit.misshapen == {"c.lora_A.weight": ((4, 9), (4, 8))}
    text = refusal(have, want)
    assert "  missing in the file (1):\n    x.lora_A.weight" in text
    assert "  not in the model (1):\n    b.lora_A.weight" in text
    assert "  of another shape (1):\n    c.lora_A.weight: the file has 4x9, the model 4x8" in text


def test_a_misspelt_key_is_shown_next_to_the_one_it_resembles():
    have = renamed(adapter(1), "q_proj.lora_A", "q_prj.lora_A")
    text = refusal(have, adapter(1))
    assert f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight  (nearest on the other side: {PREFIX}model." in text


def test_long_lists_are_cut_to_eight_lines_with_the_rest_counted():
    text = refusal({}, adapter(layers=5))
    assert "  missing in the file (20):" in text
    assert "    ... and 12 more" in text
    assert text.count("\n    base_model") == 8


def test_another_prefix_is_recognised():
    text = refusal(adapter(prefix=""), adapter())
    assert "8 names differ only at the start: the file has '', the model 'base_model.model'." in text
    assert "load it on the same class, or rename its keys" in text
    text = refusal(adapter(), adapter(prefix=""))
    assert "8 names differ only at the start: the file has 'base_model.model', the model ''." in text


def test_a_path_that_differs_in_the_middle_is_recognised():
    text = refusal(renamed(adapter(), "model.layers", "language_model.model.layers"), adapter())
    assert "8 names differ only after 'base_model.model': the file has 'language_model', the model ''." in text


def test_another_depth_is_recognised():
    assert "The file has layers 0..1, the model 0: the depth or layers_to_transform differs." in refusal(
        adapter(2), adapter(1)
    )
    assert "The file has layers 0, the model 0..2: the depth" in refusal(adapter(1), adapter(3))
    gaps = {key: shape for key, shape in adapter(4).items() if "layers.1." not in key}
    assert "The file has layers 0, 2, 3, the model 0..3: the depth" in refusal(gaps, adapter(4))


def test_another_architecture_is_recognised():
    have = {"base_model.model.transformer.h.c_attn.lora_A.weight": (4, 8)}
    text = refusal(have, adapter())
    assert (
        "No name is in both: the file is for another architecture or other target_modules. Compare its adapter_c"
        in text
    )


def test_another_rank_is_recognised():
    text = refusal(adapter(rank=16), adapter(rank=4))
    assert "  of another shape (8):" in text
    assert "The file has rank 16, the adapter rank 4. Make the adapter with r=16." in text


def test_another_width_is_not_taken_for_another_rank():
    assert "rank" not in refusal(adapter(width=16), adapter(width=8))


@pytest.mark.parametrize(
    ("key", "file", "model"),
    [
        ("model.embed_tokens.lora_embedding_A", (4, 101), (4, 100)),
        ("model.embed_tokens.base_layer.weight", (101, 8), (100, 8)),
        ("lm_head.weight", (101, 8), (100, 8)),
        ("lm_head.lora_B.weight", (101, 4), (100, 4)),
        ("transformer.wte.weight", (101, 8), (100, 8)),
    ],
)
def test_another_vocabulary_is_recognised(key, file, model):
    text = refusal(adapter() | {key: file}, adapter() | {key: model})
    assert "The file has a vocabulary of 101, the model of 100. Call model.resize_token_embeddings(101) before" in text


SETTINGS = [
    ("lora_magnitude_vector", "use_dora"),
    ("lora_B.bias", "lora_bias"),
    ("lora_diag", "init_lora_weights='kasa'"),
    ("lora_core", "init_lora_weights='lora_sb'"),
    ("token_adapter.trainable_tokens_delta", "trainable_token_indices"),
    ("lora_velora_embed", "velora_config"),
]


@pytest.mark.parametrize(("part", "setting"), SETTINGS)
def test_a_setting_that_only_one_side_has_is_named(part, setting):
    extended = adapter() | {f"{PREFIX}model.layers.0.self_attn.q_proj.{part}": (8,)}
    assert f"Only the file uses {setting}, the model does not: the two configs differ." in refusal(extended, adapter())
    assert f"Only the model uses {setting}, the file does not: the two configs differ." in refusal(adapter(), extended)


def test_a_module_of_another_name_is_recognised_in_every_layer():
    text = refusal({key.replace("self_attn", "attention"): shape for key, shape in adapter(30).items()}, adapter(30))
    assert "missing in the file (120)" in text
    assert "120 names differ only after 'base_model.model.model.layers.0': the file has 'attention', the model " in text
