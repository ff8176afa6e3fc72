"""The law of merging by files: the folder is, bit for bit, what merging in memory and saving gives."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorafa import merge_to_folder
from lorafa.variants import VARIANTS
from toys.adapters import VARIANT
from toys.architectures import gemma, gpt_oss, images_and_text, phi, sounds, speech, vision
from toys.language_models import bert, gpt2, llama, mixtral, qwen2_moe, t5
from toys.merging import TARGETS, Make, assert_same_files, config_in, place, tensors_in

pytestmark = [
    pytest.mark.filterwarnings("ignore:After merging"),
    pytest.mark.filterwarnings("ignore:.*has nothing to start from"),
]
TIED = partial(llama, tie_word_embeddings=True)
BIASED = partial(llama, attention_bias=True, mlp_bias=True)
LINEAR: dict[str, Any] = {"target_modules": "all-linear"}

MODELS: dict[str, tuple[Make, dict[str, Any]]] = {
    "llama": (llama, LINEAR),
    "llama, tied": (TIED, LINEAR),
    "llama, bias": (BIASED, LINEAR | {"lora_bias": True}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "gpt2, embedding": (gpt2, {"target_modules": ["wte"]}),
    "mixtral": (mixtral, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}),
    "qwen2 moe": (qwen2_moe, LINEAR),
    "bert": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "bert of masked words": (partial(bert, transformers.BertForMaskedLM), {"target_modules": ["query"]}),
    "gemma, a scaled embedding": (gemma, {"target_modules": ["q_proj", "embed_tokens"]}),
    "phi": (phi, LINEAR),
    "gpt-oss": (gpt_oss, LINEAR),
    "vision": (vision, {"target_modules": ["q_proj", "projection"], "modules_to_save": ["classifier"]}),
    "speech": (speech, {"target_modules": ["q_proj", "conv1"]}),
    "sounds": (sounds, {"target_modules": ["q_proj"]}),
    "t5": (t5, {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
}
SETTINGS: dict[str, tuple[Make, dict[str, Any]]] = {
    "pissa": (llama, LINEAR | {"init_lora_weights": "pissa"}),
    "dora, pissa": (llama, LINEAR | {"use_dora": True, "init_lora_weights": "pissa"}),
    "dora on an embedding": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "rank and alpha patterns": (
        llama,
        LINEAR | {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 7}},
    ),
    "biases of adapted layers": (BIASED, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "all biases": (bert, {"target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "a copy of a norm": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "embedding of a tied model": (TIED, {"target_modules": ["embed_tokens"]}),
    "head of a tied model": (TIED, {"target_modules": ["lm_head"]}),
    "both ends as one": (TIED, {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    "both ends apart": (TIED, {"target_modules": ["embed_tokens", "lm_head"]}),
    "a copy of a tied head": (TIED, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "rows of tied tables": (TIED, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 4]}),
    "rows of one table": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3]}}),
    "target parameters of a linear layer": (llama, {"target_parameters": ["q_proj.weight"], "target_modules": []}),
}


def test_so_it_is_of_a_checkpoint_with_other_names_than_the_model(tmp_path: Path) -> None:
    """The config's parts get a dtype each when transformers saves it."""
    there = place(tmp_path, images_and_text, target_modules=["q_proj", "lm_head"])
    merge_to_folder(there.adapter, there.out, base=there.base)
    found, wanted = tensors_in(there.out), tensors_in(there.merged_in_memory())
    assert any(name.startswith("language_model.") for name in found)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


FORMULAS = {name: settings for name, settings in VARIANT.items() if name != "lora"}


def law(folder: Path, make: Make, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    there = place(folder, make, **more, **settings)
    merge_to_folder(there.adapter, there.out, base=there.base)
    assert_same_files(there.out, there.merged_in_memory())
    again = there.kind.from_pretrained(there.out, output_loading_info=True)[1]
    assert not again["missing_keys"]
    assert not again["unexpected_keys"]
    return config_in(there.out)


@pytest.mark.parametrize("case", MODELS)
def test_the_folder_is_what_merging_in_memory_saves(case: str, tmp_path: Path) -> None:
    law(tmp_path, *MODELS[case])


@pytest.mark.parametrize("case", SETTINGS)
def test_so_it_is_for_every_start_and_every_place(case: str, tmp_path: Path) -> None:
    law(tmp_path, *SETTINGS[case])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_so_it_is_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    law(tmp_path, llama, LINEAR, dtype=dtype)


def grown(model: Any) -> Any:
    torch.manual_seed(5)
    model.resize_token_embeddings(40, mean_resizing=False)
    return model


@pytest.mark.parametrize("make", [llama, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [35, 36]},
    ],
    ids=["tables beside", "copies", "adapted", "rows"],
)
def test_so_it_is_of_a_vocabulary_that_was_resized(make: Make, settings: dict[str, Any], tmp_path: Path) -> None:
    assert law(tmp_path, make, settings, prepare=grown)["vocab_size"] == 40


@pytest.mark.parametrize(
    "formula", [pytest.param(name, marks=pytest.mark.slow) if " over " in name else name for name in FORMULAS]
)
def test_so_it_is_for_every_formula_of_one_matrix(formula: str, tmp_path: Path) -> None:
    settings = FORMULAS[formula]
    if "use_bdlora" in settings:  # whose blocks are of layers by name
        names = {key: TARGETS if isinstance(value, list) else value for key, value in settings["use_bdlora"].items()}
        settings = settings | {"use_bdlora": names}
    law(tmp_path, llama, {"target_modules": TARGETS} | settings)


def test_every_formula_of_one_matrix_is_tried() -> None:
    tried = {part for name in FORMULAS for part in name.split(" over ")} | {"lora"}
    assert tried == {name for name in VARIANTS.names() if VARIANTS.get(name).uniform}
