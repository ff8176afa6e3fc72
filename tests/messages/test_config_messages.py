"""The text of every error a config raises: what was wrong, what was found, what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, ConfigError
from lorafa.settings.methods import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from lorafa.version import VERSION

ORTHOGONAL = {"init_lora_weights": "orthogonal"}

ALPHA = "must be a number > 0 that float32 can scale by (1e-30 to 1e30)"

FIELDS: list[tuple[dict[str, object], str]] = [
    ({"r": 0}, "r must be an integer >= 1, found 0 (int). Pass a number such as 8, without quotes."),
    ({"r": "8"}, "r must be an integer >= 1, found '8' (str). Pass r=8 if that is meant."),
    ({"r": True}, "r must be an integer >= 1, found True (bool). Pass a number such as 8, without quotes."),
    ({"r": 4.0}, "r must be an integer >= 1, found 4.0 (float). Pass r=4 if that is meant."),
    ({"r": None}, "r must be an integer >= 1, found None (NoneType). Pass a number such as 8, without quotes."),
    ({"lora_alpha": 0}, f"lora_alpha {ALPHA}, found 0. Pass a number in that range."),
    ({"lora_alpha": "16"}, f"lora_alpha {ALPHA}, found '16' (str). Pass a finite number."),
    ({"lora_alpha": 1e39}, f"lora_alpha {ALPHA}, found 1e+39."),
    ({"lora_alpha": 1e-300}, f"lora_alpha {ALPHA}, found 1e-300."),
    ({"lora_alpha": float("inf")}, f"lora_alpha {ALPHA}, found inf (float). Pass a finite number."),
    ({"lora_dropout": 1.5}, "lora_dropout must be a probability in [0, 1), found 1.5. Pass a number in that range."),
    ({"lora_dropout": 1}, "lora_dropout must be a probability in [0, 1), found 1."),
    ({"lora_dropout": -0.5}, "lora_dropout must be a probability in [0, 1), found -0.5."),
    ({"lora_dropout": True}, "lora_dropout must be a probability in [0, 1), found True (bool)."),
    ({"bias": "nope"}, "bias has no value 'nope'. Did you mean 'none'? Pass one of: 'none', 'all', 'lora_only'."),
    ({"bias": False}, "bias has no value False. Pass one of:"),
    ({"init_lora_weights": "pisa"}, "init_lora_weights has no value 'pisa'. Did you mean 'pissa'? Pass True, False, "),
    ({"init_lora_weights": "pissa_niter_x"}, "init_lora_weights has no value 'pissa_niter_x'."),
    ({"init_lora_weights": None}, "init_lora_weights has no value None."),
    ({"init_lora_weights": 1}, "init_lora_weights has no value 1."),
    ({"use_dora": "yes"}, "use_dora must be True or False, found 'yes' (str)."),
    ({"task_type": "CAUSAL"}, "task_type has no value 'CAUSAL'. Did you mean 'CAUSAL_LM'? Pass one of: 'SEQ_CLS', "),
    ({"peft_type": "IA3"}, "peft_type has no value 'IA3'. Pass one of: 'LORA'."),
    ({"revision": 3}, "revision must be a text or None, found 3 (int). Put it in quotes."),
    ({"auto_mapping": "x"}, "auto_mapping must be a dict or None, found 'x' (str). Drop it or pass a dict."),
    ({"target_modules": 7}, "target_modules must be a list of names, found 7 (int). Pass for example target_modules=["),
    ({"target_modules": ["q", 1]}, "target_modules must hold names only, found 1 (int). Remove it or name the module."),
    ({"target_modules": ["q", ""]}, "target_modules must hold names only, found '' (str)."),
    ({"target_modules": ""}, "target_modules holds an empty text, which names no module. Name one, or pass None."),
    ({"target_modules": "(q"}, "target_modules has '(q', which is no regular expression: missing ), "),
    ({"exclude_modules": 1}, "exclude_modules must be a list of names, found 1 (int)."),
    (
        {"modules_to_save": "head"},
        "modules_to_save must be a list of names, found 'head' (str). Pass modules_to_save=['h",
    ),
    (
        {"target_parameters": "w"},
        "target_parameters must be a list of names, found 'w' (str). Pass target_parameters=['w",
    ),
    (
        {"rank_pattern": [4]},
        'rank_pattern must be a dict from module names to numbers, found [4] (list). Pass {"q_proj": 8}.',
    ),
    ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] must be an integer >= 1, found 0 (int)."),
    (
        {"rank_pattern": {"q": "4"}},
        "rank_pattern['q'] must be an integer >= 1, found '4' (str). Pass 4 if that is what",
    ),
    ({"rank_pattern": {"[q": 4}}, "rank_pattern has '[q', which is no regular expression: unterminated"),
    ({"alpha_pattern": {"q": -1}}, f"alpha_pattern['q'] {ALPHA}, found -1."),
    ({"layers_to_transform": -1}, "layers_to_transform must be an integer >= 0, found -1 (int)."),
    (
        {"layers_to_transform": "0"},
        "layers_to_transform must be a list of integers, found '0' (str). Pass for example [0, ",
    ),
    ({"layers_to_transform": [0, "1"]}, "layers_to_transform must hold integers >= 0 only, found '1' (str)."),
    ({"layers_to_transform": [1, 1]}, "layers_to_transform lists 1 more than once. Give every index once."),
    ({"trainable_token_indices": [3, -1]}, "trainable_token_indices must hold integers >= 0 only, found -1 (int)."),
    ({"trainable_token_indices": [3, 3]}, "trainable_token_indices lists 3 more than once."),
    ({"trainable_token_indices": {"e": 1}}, "trainable_token_indices['e'] must be a list of integers, found 1 (int)."),
    ({"trainable_token_indices": 1}, "trainable_token_indices must be a list of integers, found 1 (int)."),
    ({"layers_pattern": 3, "layers_to_transform": [0]}, "layers_pattern must be a list of names, found 3 (int)."),
    (
        {"layer_replication": "x"},
        "layer_replication must be a list of (start, end) pairs, found 'x' (str). Pass [(0, 4)",
    ),
    (
        {"layer_replication": [(3, 1)]},
        "layer_replication must hold (start, end) pairs with 0 <= start < end, found (3, 1)",
    ),
    (
        {"alora_invocation_tokens": "hi"},
        "alora_invocation_tokens must be a list of token ids, one at least, found 'hi' (str). Tokenize",
    ),
    ({"freeze_A": "yes"}, "freeze_A must be True or False, found 'yes' (str)."),
    ({"init_seed": -1}, "init_seed must be an integer >= 0, found -1 (int)."),
    ({"qalora_group_size": 0}, "qalora_group_size must be an integer >= 1, found 0 (int)."),
]

COMBINATIONS: list[tuple[dict[str, object], str]] = [
    (
        {"target_modules": "all-linear", "layers_to_transform": [0]},
        "layers_to_transform needs a list of target_modules, found the text 'all-linear'. Pass a list such as",
    ),
    (
        {"target_modules": ".*q", "layers_pattern": "h"},
        "layers_pattern needs a list of target_modules, found the text '.*q'.",
    ),
    (
        {"target_modules": ["q"], "layers_pattern": "h"},
        "layers_pattern='h' says which list to count in, but layers_to_transform, which says what to pick, is None.",
    ),
    (
        ORTHOGONAL | {"r": 3},
        "init_lora_weights='orthogonal' shares the rows of one orthogonal matrix between A and B and needs an even "
        "rank, found r=3. Use 4 or another start.",
    ),
    (ORTHOGONAL | {"rank_pattern": {"q": 5}}, "needs an even rank, found rank_pattern['q']=5. Use 6 or another start."),
    (
        {"lora_bias": True, "init_lora_weights": "kasa"},
        "lora_bias=True does not work with init_lora_weights='kasa'. Drop one of the two.",
    ),
    ({"lora_bias": True, "use_dora": True}, "lora_bias=True does not work with use_dora=True. Drop one of the two."),
    (
        {"use_dora": True, "megatron_config": {"x": 1}},
        "use_dora does not work on Megatron's layers. Drop megatron_config or set use_dora=False.",
    ),
    (
        {"init_lora_weights": "loftq"},
        "init_lora_weights='loftq' needs loftq_config. Pass loftq_config=LoftQConfig().",
    ),
    (
        {"loftq_config": LoftQConfig()},
        "loftq_config is set but would be ignored: init_lora_weights is True. Set init_lora_weights='loftq' or",
    ),
    (
        {"init_lora_weights": "corda", "eva_config": EvaConfig()},
        "eva_config is set but would be ignored: init_lora_weights is 'corda'. Set init_lora_weights='eva' or",
    ),
    (
        {"eva_config": 3},
        "eva_config must be EvaConfig(...), a dict or None, found 3 (int). Pass eva_config=EvaConfig() for the",
    ),
    (
        {"kasa_config": {"betta": 1}},
        "kasa_config (KasaConfig) has no setting 'betta' (found betta=1). Did you mean 'beta'? It has: beta, gamma.",
    ),
]

NESTED: list[tuple[Callable[[], object], str]] = [
    (lambda: LoraRuntimeConfig(ephemeral_gpu_offload=1), "ephemeral_gpu_offload must be True or False, found 1 (int)."),
    (lambda: LoftQConfig(loftq_bits=3), "loftq_bits must be 4 or 8, found 3 (int). Pass loftq_bits=4."),
    (lambda: LoftQConfig(loftq_iter=0), "loftq_iter must be an integer >= 1, found 0 (int)."),
    (lambda: EvaConfig(rho=0.5), "rho must be a number >= 1, found 0.5. Pass a number in that range."),
    (lambda: EvaConfig(tau=1.1), "tau must be a number in [0, 1], found 1.1. Pass a number in that range."),
    (lambda: EvaConfig(whiten=None), "whiten must be True or False, found None (NoneType)."),
    (
        lambda: CordaConfig(corda_method="ipn"),
        "corda_method has no value 'ipn'. Did you mean 'ipm'? Pass one of: 'ipm', ",
    ),
    (lambda: CordaConfig(cache_file=1), "cache_file must be a text or None, found 1 (int). Put it in quotes."),
    (lambda: LoraGAConfig(direction="A2rBrr"), "direction has no value 'A2rBrr'. Did you mean 'A2rBr'? Pass one of: "),
    (lambda: LoraGAConfig(scale="none"), "scale has no value 'none'."),
    (lambda: LoraGAConfig(stable_gamma=0), "stable_gamma must be a number > 0, found 0."),
    (lambda: ArrowConfig(top_k=0), "top_k must be an integer >= 1, found 0 (int)."),
    (lambda: ArrowConfig(router_temperature=0.0), "router_temperature must be a number > 0, found 0.0."),
    (
        lambda: BdLoraConfig(["up", "q"], ["q"]),
        "'q' is in target_modules_bd_a and in target_modules_bd_b, but only one of A and B can be block-diagonal.",
    ),
    (lambda: BdLoraConfig(nblocks=0), "nblocks must be an integer >= 1, found 0 (int)."),
    (lambda: VeloraConfig(num_groups=0), "num_groups must be an integer >= 1, found 0 (int)."),
    (lambda: VeloraConfig(scale=0.0), "scale must be a number > 0, found 0.0."),
    (lambda: VeloraConfig(init_type="randon"), "init_type has no value 'randon'. Did you mean 'random'?"),
    (lambda: KasaConfig(beta=-1), "beta must be a number >= 0, found -1."),
    (lambda: KasaConfig(gamma=-1), "gamma must be a number >= 0, found -1."),
    (lambda: MontecloraConfig(num_samples=0), "num_samples must be an integer >= 1, found 0 (int)."),
    (lambda: MontecloraConfig(dirichlet_prior=0), "dirichlet_prior must be a number > 0, found 0."),
    (lambda: MontecloraConfig(buffer_size=0), "buffer_size must be an integer >= 1, found 0 (int)."),
]


@pytest.mark.parametrize(("settings", "text"), FIELDS + COMBINATIONS, ids=lambda case: str(case)[:60])
def test_a_wrong_setting_is_refused_in_sentences_where_the_config_is_made(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)) as caught:
        LoraConfig(**settings)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(("make", "text"), NESTED, ids=[text[:40] for _, text in NESTED])
def test_a_wrong_setting_of_a_method_is_refused_where_its_config_is_made(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)) as caught:
        make()
    assert str(caught.value).endswith(".")


def test_a_setting_made_wrong_later_is_found_by_check() -> None:
    config = LoraConfig()
    config.r = -1
    with pytest.raises(ConfigError, match=r"r must be an integer >= 1, found -1"):
        config.check()


FILES: list[tuple[str, type[Exception], str]] = [
    ('{"r": 8}', ConfigError, "The config has no peft_type, so it describes no adapter. Expected peft_type='LORA'."),
    ('{"peft_type": "IA3"}', ConfigError, "peft_type has no value 'IA3'. Pass one of: 'LORA'."),
    (
        '{"peft_type": "LORA", "use_rsora": true}',
        ConfigError,
        f"The config sets use_rsora=True, which lorafa {VERSION} does not know and which may change what the adapter "
        "computes. Did you mean 'use_rslora'? Use a version that knows it, or delete the key if you are sure that it",
    ),
    ('{"peft_type": "LORA", "some_scale": 0}', ConfigError, "The config sets some_scale=0, which lorafa"),
    ('{"peft_type": "LORA", "r": "8"}', ConfigError, "r must be an integer >= 1, found '8' (str)."),
    ('{"peft_type": "LO', CheckpointError, " is not a json file: Unterminated string"),
    ("[1]", CheckpointError, " holds a list, expected an object {...}. Is it the right file?"),
]


@pytest.mark.parametrize(("content", "kind", "text"), FILES, ids=[content for content, _, _ in FILES])
def test_a_wrong_file_is_refused_with_its_path(content: str, kind: type[Exception], text: str, tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(content)
    with pytest.raises(kind, match=re.escape(str(path)) + ".*" + re.escape(text)):
        LoraConfig.from_pretrained(tmp_path)
