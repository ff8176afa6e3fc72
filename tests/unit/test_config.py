"""LoraConfig: the same fields and the same json as PEFT's, checked where it is made, never changed behind the user."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import re

import pytest
from torch import nn

import lorafa.settings.methods as methods
from lorafa import get_peft_model
from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, ConfigError, NotAvailableError
from lorafa.layers.base import LoraLayer
from lorafa.settings.methods import PeftType, TaskType
from lorafa.surgery import available
from lorafa.surgery.available import require_available, unavailable
from lorafa.version import VERSION
from toys.places import ROOT

NESTED = [
    "LoraRuntimeConfig",
    "LoftQConfig",
    "EvaConfig",
    "CordaConfig",
    "LoraGAConfig",
    "ArrowConfig",
    "BdLoraConfig",
    "VeloraConfig",
    "KasaConfig",
    "MontecloraConfig",
]
SETTINGS: list[dict[str, object]] = [
    {},
    {"r": 16, "lora_alpha": 5.5, "target_modules": ["v_proj", "q_proj"], "task_type": "CAUSAL_LM"},
    {"target_modules": r".*\.q_proj", "exclude_modules": ["lm_head"], "bias": "lora_only", "use_rslora": True},
    {"target_modules": ["fc"], "layers_to_transform": [0, 2], "layers_pattern": "h", "rank_pattern": {"fc": 4}},
    {"layers_to_transform": 1, "alpha_pattern": {"^h.0.fc": 2.5}, "modules_to_save": ["head"], "lora_bias": True},
    {"trainable_token_indices": {"embed_tokens": [7, 1]}, "target_parameters": ["experts.down_proj"]},
    {"trainable_token_indices": [3], "use_dora": True, "init_lora_weights": "gaussian"},
    {"init_lora_weights": "eva"},
    {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    {"init_lora_weights": "pissa_niter_4", "layer_replication": [(0, 2), (1, 3)]},
    {"kasa_config": {"beta": 0.5}},
    {"use_bdlora": {"nblocks": 2}},
    {"velora_config": {"num_groups": 8}},
    {"arrow_config": {"top_k": 2, "task_adapter_names": ["a"]}, "monteclora_config": {"num_samples": 2}},
]


def json_ready(value: object) -> object:
    """What PEFT's save_pretrained makes of a dict, with sets in order."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    return [json_ready(item) for item in value] if isinstance(value, (list, tuple)) else value


def defaults_of(config_class: type) -> list[tuple[str, object, bool]]:
    def default(field: dataclasses.Field[object]) -> object:
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        return dataclasses.asdict(made) if dataclasses.is_dataclass(made) and not isinstance(made, type) else made

    return [(field.name, default(field), field.init) for field in dataclasses.fields(config_class)]


def test_lora_config_has_the_fields_of_peft_in_the_same_order_with_the_same_defaults():
    peft = pytest.importorskip("peft")
    theirs, ours = defaults_of(peft.LoraConfig), defaults_of(LoraConfig)
    assert ours[: len(theirs)] == theirs
    assert ours[len(theirs) :] == [
        ("freeze_A", False, True),
        ("init_seed", None, True),
        ("attention_out_proj_twice", False, True),
        ("init_config", None, True),
    ]


@pytest.mark.parametrize("name", NESTED)
def test_nested_config_has_the_fields_of_peft_in_the_same_order_with_the_same_defaults(name):
    theirs = pytest.importorskip("peft.tuners.lora.config")
    ours, wanted = defaults_of(getattr(methods, name)), defaults_of(getattr(theirs, name))
    assert ours[: len(wanted)] == wanted
    own = {f.name for f in dataclasses.fields(getattr(methods, name)) if f.metadata == methods.OWN}
    assert {field for field, _, _ in ours[len(wanted) :]} == own


def test_a_file_names_the_fields_of_nested_configs_that_peft_does_not_have_where_they_say_something():
    assert list(LoraConfig(arrow_config={"top_k": 2}).to_dict()["arrow_config"]) == [
        *("top_k", "router_temperature", "use_gks", "task_adapter_names", "gks_adapter_names", "rng_seed"),
    ]
    config = LoraConfig(arrow_config={"normalize_tokens": True})
    assert config.to_dict()["arrow_config"]["normalize_tokens"] is True
    assert LoraConfig.from_dict(config.to_dict()) == config


def test_task_types_are_those_of_peft():
    peft = pytest.importorskip("peft")
    assert [item.value for item in TaskType] == [item.value for item in peft.TaskType]
    assert peft.PeftType.LORA.value == PeftType.LORA


def test_the_start_of_a_config_is_the_line_of_the_table_that_its_value_means():
    assert [LoraConfig(init_lora_weights=value).start.name for value in (True, False, "PiSSA")] == [
        "kaiming",
        "random",
        "pissa",
    ]
    assert LoraConfig(init_lora_weights="pissa_niter_4").start.number == 4
    changed = LoraConfig()
    changed.init_lora_weights = "pisa"
    with pytest.raises(ConfigError, match=r"init_lora_weights has no value 'pisa'\. Did you mean 'pissa'\? Pass True,"):
        changed.start  # noqa: B018


@pytest.mark.parametrize("settings", SETTINGS)
def test_to_dict_equals_that_of_peft_key_for_key(settings):
    peft = pytest.importorskip("peft")
    theirs = json_ready(peft.LoraConfig(**without_set_by_library(settings)).to_dict())
    ours = LoraConfig(**without_set_by_library(settings)).to_dict()
    assert list(ours) == list(theirs)
    assert {**ours, "peft_version": None} == {**theirs, "peft_version": None}


def without_set_by_library(settings: dict[str, object]) -> dict[str, object]:
    return {k: {"top_k": 2} if k == "arrow_config" else copy.deepcopy(v) for k, v in settings.items()}


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_saved_config_comes_back_equal(settings, tmp_path):
    config = LoraConfig(**settings)
    config.save_pretrained(tmp_path / "new" / "folder")
    assert LoraConfig.from_pretrained(tmp_path / "new" / "folder") == config
    assert LoraConfig.from_pretrained(tmp_path, subfolder="new/folder") == config


@pytest.mark.parametrize("settings", SETTINGS)
def test_peft_reads_what_we_write_and_we_what_peft_writes(settings, tmp_path):
    peft = pytest.importorskip("peft")
    config = LoraConfig(**settings)
    config.save_pretrained(tmp_path)
    theirs = peft.LoraConfig.from_pretrained(str(tmp_path))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = LoraConfig.from_pretrained(tmp_path / "theirs")
    again.peft_version = None
    if "arrow_config" in settings:  # PEFT does not bring back what it set itself
        again.arrow_config.task_adapter_names = config.arrow_config.task_adapter_names
    assert again == config


def test_lorafa_only_fields_are_written_only_when_they_are_used():
    assert "init_seed" not in LoraConfig().to_dict()
    assert LoraConfig(init_seed=0).to_dict()["init_seed"] == 0
    assert LoraConfig.from_dict(LoraConfig(attention_out_proj_twice=True).to_dict()).attention_out_proj_twice


def test_the_json_is_what_every_reader_of_peft_files_expects(tmp_path):
    LoraConfig(target_modules=["b", "a"], task_type=TaskType.CAUSAL_LM).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    values = json.loads(text)
    assert text == json.dumps(values, indent=2, sort_keys=True)
    assert values["peft_type"] == "LORA"
    assert values["task_type"] == "CAUSAL_LM"
    assert values["target_modules"] == ["a", "b"]
    assert values["loftq_config"] == {}
    assert "runtime_config" not in values


def test_nothing_that_was_handed_in_is_changed_or_shared():
    targets, ranks, rows, eva = ["q", "v"], {"q": 2}, {"embed": [1]}, methods.EvaConfig(rho=1.0)
    config = LoraConfig(target_modules=targets, rank_pattern=ranks, trainable_token_indices=rows)
    config.target_modules.add("k")
    config.rank_pattern["k"] = 3
    config.trainable_token_indices["embed"].append(2)
    other = LoraConfig(init_lora_weights="eva", eva_config=eva)
    other.eva_config.rho = 3.0
    assert (targets, ranks, rows, eva.rho) == (["q", "v"], {"q": 2}, {"embed": [1]}, 1.0)


def test_a_path_is_taken_where_a_file_or_folder_is_named_and_written_as_its_text(tmp_path):
    corda = {"cache_file": tmp_path / "a.pt", "covariance_file": tmp_path / "b.safetensors"}
    config = LoraConfig(
        base_model_name_or_path=tmp_path / "base", init_lora_weights="corda", corda_config=methods.CordaConfig(**corda)
    )
    texts = {name: str(value) for name, value in corda.items()}
    assert config.base_model_name_or_path == str(tmp_path / "base")
    assert {name: getattr(config.corda_config, name) for name in corda} == texts
    assert LoraConfig(init_lora_weights="corda", corda_config=corda).corda_config == config.corda_config
    config.corda_config.cache_file = tmp_path / "later.pt"
    config.save_pretrained(tmp_path)
    again = LoraConfig.from_pretrained(tmp_path)
    assert again.base_model_name_or_path == str(tmp_path / "base")
    assert again.corda_config.cache_file == str(tmp_path / "later.pt")
    with pytest.raises(ConfigError, match=r"covariance_file must be a text or None, found 3 \(int\)"):
        methods.CordaConfig(covariance_file=3)


def test_a_list_of_targets_becomes_a_set_and_a_text_stays_a_text():
    assert LoraConfig(target_modules=["q", "v"]).target_modules == {"q", "v"}
    assert LoraConfig(target_modules=("q",)).target_modules == {"q"}
    assert LoraConfig(target_modules=[]).target_modules == set()
    assert LoraConfig(target_modules="all-linear").target_modules == "all-linear"


def test_scaling_is_alpha_over_r_and_with_rslora_alpha_over_the_root_of_r():
    assert LoraConfig().scaling(4, 8) == 2.0
    assert LoraConfig(use_rslora=True).scaling(4, 8) == 4.0
    assert LoraConfig(use_rslora=True).scaling(2, 1) == 1 / math.sqrt(2)


def test_names_of_starts_may_be_written_as_in_their_papers():
    assert LoraConfig(init_lora_weights="OLoRA").init_lora_weights == "olora"


def test_starts_with_settings_get_the_default_settings():
    assert LoraConfig(init_lora_weights="eva").eva_config == methods.EvaConfig()
    assert LoraConfig(init_lora_weights="corda").corda_config == methods.CordaConfig()
    assert LoraConfig(init_lora_weights="lora_ga").lora_ga_config == methods.LoraGAConfig()


def test_a_config_can_be_copied_replaced_and_pickled():
    config = LoraConfig(r=4, target_modules=["q"], loftq_config=methods.LoftQConfig(), init_lora_weights="loftq")
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, r=2).r == 2
    assert config.r == 4


@pytest.mark.parametrize("value", [None, False, "", {}, []])
def test_an_unknown_key_without_a_value_is_harmless(value):
    assert LoraConfig.from_dict({"peft_type": "LORA", "use_something_new": value}) == LoraConfig()


def test_the_smallest_file_that_peft_accepts_is_accepted():
    assert LoraConfig.from_dict({"peft_type": "LORA", "target_modules": ["q"]}).r == 8


def test_a_runtime_config_in_a_file_is_not_taken_over():
    config = LoraConfig.from_dict({"peft_type": "LORA", "runtime_config": {"ephemeral_gpu_offload": True}})
    assert not config.runtime_config.ephemeral_gpu_offload


def test_a_file_converted_to_plain_lora_may_still_carry_the_settings_of_its_start():
    values = {"peft_type": "LORA", "init_lora_weights": True, "corda_config": {"corda_method": "kpm"}}
    assert LoraConfig.from_dict(values).corda_config is None


def test_from_json_file_gives_the_keys_as_they_stand(tmp_path):
    (tmp_path / "c.json").write_text('{"peft_type": "LORA", "r": 3, "other": 1}')
    assert LoraConfig.from_json_file(tmp_path / "c.json") == {"peft_type": "LORA", "r": 3, "other": 1}


def test_saving_over_a_file_leaves_the_file(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match=r"taken is a file, not a folder\. Choose a folder to save to\."):
        LoraConfig().save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


LATER: list[tuple[dict[str, object], str]] = [
    ({"megatron_config": {"x": 1}}, "megatron_config"),
]


@pytest.mark.parametrize(("settings", "named"), LATER)
def test_what_is_not_there_yet_is_accepted_by_the_config_and_refused_by_name_before_use(settings, named):
    config = LoraConfig(**settings)
    (feature,) = unavailable(config)
    assert named in feature
    with pytest.raises(NotAvailableError, match=rf"(?s){named}.* is not available yet in lorafa .*nothing was changed"):
        require_available(config)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "pissa"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_what_is_there_is_available_and_makes_an_adapter(start, use_dora):
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=start, use_dora=use_dora)
    require_available(config)
    assert unavailable(config) == []
    layer = get_peft_model(nn.Sequential(nn.Linear(8, 6)), config).get_base_model()[0]
    assert isinstance(layer, LoraLayer)
    assert layer.use_dora == {"default": use_dora}


def test_two_features_that_are_not_there_are_both_named(monkeypatch):
    monkeypatch.setattr(available, "_LATER_FIELDS", {"megatron_config": "Megatron", "bias": "Biases"})
    config = LoraConfig(megatron_config={"x": 1}, bias="all")
    with pytest.raises(NotAvailableError, match=r"^Megatron \(megatron_config=.*\) and Biases \(bias='all'\) are not"):
        require_available(config)


def test_the_version_in_the_code_is_the_one_of_the_package():
    project = ROOT / "pyproject.toml"
    (version,) = re.findall(r'^version = "(.+)"$', project.read_text(), flags=re.MULTILINE)
    assert version == VERSION


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_model_name_or_path", 5),
        ("task_type", "NONE"),
        ("modules_to_save", "head"),
        ("target_parameters", [1]),
        ("layer_replication", [[4, 2]]),
        ("trainable_token_indices", {"embed": None}),
        ("eva_config", 3),
    ],
)
def test_a_field_that_was_set_afterwards_is_checked_again(name: str, value: object) -> None:
    config = LoraConfig(target_modules=["fc"])
    setattr(config, name, value)
    with pytest.raises(ConfigError, match=name):
        config.check()
    with pytest.raises(ConfigError, match=name):
        LoraConfig(target_modules=["fc"], **{name: value})
