"""What each key of the published `run_exp.py` means here, with the published defaults, and what every mistake gets."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafa.errors import ConfigError, LoraError, NotAvailableError
from lorafa.runs import record
from lorafa.runs.record import RunDirectory
from lorafa.scripts.published import FOLDER, GROUPS, IMAGES, PUBLISHED_KEYS, options
from lorafa.scripts.run_exp import compose_published, keys_help, placed
from lorafa.settings.typed import plain
from lorafa.train.settings.run import PeftConfig, RunConfig
from toys.kinds import make_t5
from toys.places import ROOT
from toys.workplace import make_workplace

COMMAND = (
    "++dataset_name=meta_math ++model.epochs=1 ++model.eval_epochs=1 +init=gradient ++init.direction=LoRA-FA "
    '++init.weight="stable" ++init.stable_gamma=128 +peft=qv ++peft.lora_r=8 ++peft.use_rslora=True '
    "++peft.lora_alpha=16 ++wandb.name=one ++wandb.project=lorafa ++init.iters=8"
)
"""The settings of both documented commands."""
BLOCK = """
model:
  bf16: true
  max_length: 1024
  prec_reg: 1.0e-06
  saving: false
init:
  mode: gradient
  direction: LoRA-FA
  max_length: 1024
  scale: stable
  stable_gamma: 128
  bsz: 1
  iters: 8
"""
"""The documented block of parameters."""
BASE = "+peft=all ++peft.lora_r=4"
PUBLISHED = (
    "sst2", "cola", "qqp", "mrpc", "mnli", "qnli", "emo", "squad", "boolq", "cb", "copa", "rte", "wic", "alpaca",
    "alpaca_gpt4", "commonsense_reasoning", "gsm8k", "meta_math", "meta_math_full", "codefeedback", "wizard_lm", "flan",
    "flan_v2",
)  # fmt: skip
"""The values of dataset_name that the published scripts take, without those of images."""
FULL = "full" in {field.name for field in fields(PeftConfig)}


def config_of(words: str) -> RunConfig:
    return compose_published(words.split())[1]


def notes_of(words: str) -> list[str]:
    return compose_published(words.split())[0].notes


def at(config: RunConfig, name: str) -> Any:
    values: Any = plain(config)
    for part in name.split("."):
        values = values[part]
    return values


# ---- the documented command -----------------------------------------------------------------------------------------


def test_the_documented_command_means_what_it_meant() -> None:
    config = config_of(COMMAND)
    expected = {
        "model.name": "meta-llama/Llama-2-7b-hf", "model.dtype": "bfloat16", "model.attention": "auto",
        "data.name": "meta_math", "data.max_length": 1024, "data.template": "spaced", "data.train_size": None,
        "peft.r": 8, "peft.lora_alpha": 16, "peft.use_rslora": True, "peft.lora_dropout": 0.0, "peft.use_dora": False,
        "peft.target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], "peft.modules_to_save": None,
        "init.mode": "gradient", "init.direction": "LoRA-FA", "init.scale": "stable", "init.stable_gamma": 128.0,
        "init.bsz": 1, "init.iters": 8, "init.max_length": 1024,
        "optim.name": "adamw", "optim.lr": 2e-5, "optim.weight_decay": 0.0, "optim.schedule": "linear",
        "optim.warmup": 100.0, "optim.shorten_warmup": True, "optim.betas": [0.9, 0.999], "optim.eps": 1e-8,
        "train.epochs": 1.0, "train.steps": None, "train.batch_size": 1, "train.accumulation": 32,
        "train.eval_epochs": 1.0, "train.checkpoint_epochs": 1.0, "train.keep_checkpoints": 1, "train.seed": 42,
        "train.log_every": 1, "train.group_by_length": False, "train.gradient_checkpointing": False,
        "train.patience": None, "train.keep_best": False, "train.save_merged": True, "eval.name": "loss",
        "run_dir": "runs/one", "report_to": "none", "report_project": "lorafa",
    }  # fmt: skip
    assert {name: at(config, name) for name in expected} == expected
    assert notes_of(COMMAND) == [
        "init.weight=stable changes nothing: the published code reads init.scale, of which stable is the default.",
    ]


def test_the_documented_block_of_parameters_is_taken_key_by_key() -> None:
    block = [f"++{g}.{key}={str(v).lower()}" for g, keys in yaml.safe_load(BLOCK).items() for key, v in keys.items()]
    words = " ".join([*block, "+init=gradient", BASE]).replace("lora-fa", "LoRA-FA")
    assert at(config_of(words), "train.save_merged") is False
    assert at(config_of(words), "init.direction") == "LoRA-FA"
    assert [note.partition("=")[0] for note in notes_of(words)] == ["model.prec_reg"]


# ---- key by key -----------------------------------------------------------------------------------------------------


@pytest.mark.matrix(4, each_word=False)
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("++model.learning_rate=3e-4", {"optim.lr": 3e-4}),
        ("++model.weight_decay=0.1", {"optim.weight_decay": 0.1}),
        ("++model.logging_steps=5", {"train.log_every": 5}),
        ("++model.bf16=false", {"model.dtype": "float32"}),
        ("++model.max_length=64", {"data.max_length": 64}),
        ("++model.real_batch_size=12 ++model.per_device_batch_size=3", {"train.batch_size": 3, "train.accumulation": 4,
                                                                        "eval.batch_size": 3}),
        ("++model.eval_epochs=0.5 ++model.epochs=3", {"train.eval_epochs": 0.5, "train.keep_checkpoints": 1}),
        ("++model.eval_epochs=3 ++model.epochs=9", {"train.eval_epochs": 3.0, "train.keep_checkpoints": 3}),
        ("++model.eval_epochs=null", {"train.eval_epochs": None}),
        ("++model.saving=false", {"train.save_merged": False}),
        ("++seed=7", {"train.seed": 7}),
        ("++gradient_checkpointing=True", {"train.gradient_checkpointing": True}),
        ("++dataset_name=~/rows(1).jsonl", {"data.name": "~/rows(1).jsonl"}),
        ("++dataset_name=owner/name", {"data.name": "owner/name"}),
        ("++model.name=../my-model", {"model.name": "../my-model"}),
        ("model=tinyllama", {"model.name": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "optim.lr": 1e-5,
                             "data.max_length": 512, "optim.weight_decay": 0.0, "train.save_merged": True}),
        ("+peft=qv ++peft.lora_dropout=0.05", {"peft.lora_dropout": 0.05}),
        ("+peft=all", {"peft.target_modules": "all-linear", "peft.lora_alpha": 16}),
        ("+peft=dora", {"peft.use_dora": True, "peft.target_modules": "all-linear", "peft.lora_dropout": 0.0}),
        ("++peft.dora=true +init=gradient", {"peft.use_dora": True, "init.mode": "gradient"}),
        ("+peft=all_w_emb", {"peft.modules_to_save": ["lm_head"]}),
        ("+peft=qv_w_emb", {"peft.modules_to_save": ["lm_head"], "peft.target_modules": ["q", "v"]}),
        ("++peft.train_embeddings=true", {"peft.modules_to_save": ["lm_head"]}),
        ("++peft.lora_target_modules=[o_proj]", {"peft.target_modules": ["o_proj"]}),
        ("++peft.lora_target_modules=o_proj", {"peft.target_modules": ["o_proj"]}),
        ("++peft.use_loraplus=true", {"optim.name": "lora_plus", "optim.lr_ratio": 16.0, "optim.lr": 2e-5}),
        ("++peft.use_loraplus=true ++peft.loraplus_lr_ratio=4", {"optim.lr_ratio": 4.0}),
        ("", {"init.mode": "default"}),
        ("+init=default", {"init.mode": "default"}),
        ("+init=kaiming", {"init.mode": "both_random", "init.lora_A": "kaiming", "init.lora_B": "kaiming",
                           "init.scale": "default", "init.norm_clip": False}),
        ("+init=gaussian", {"init.mode": "both_random", "init.lora_A": "unit", "init.lora_B": "unit"}),
        ("+init=gaussian ++init.scale=stable", {"init.scale": "stable", "init.stable_gamma": 16.0}),
        ("+init=gaussian ++init.lora_A=gaussian ++init.lora_A_std=0.02", {"init.lora_A": "gaussian",
                                                                          "init.lora_A_std": 0.02}),
        ("+init=default ++init.lora_A=xavier", {"init.mode": "both_random", "init.lora_B": "zeros"}),
        ("+init=svd", {"init.mode": "svd_of_weight", "init.scale": "default"}),
        ("+init=svd ++init.scale=unit ++init.norm_clip=true", {"init.scale": "unit", "init.norm_clip": True}),
        ("+init=svd ++init.scale=stable", {"init.stable_gamma": 16.0}),
        ("+init=gradient", {"init.direction": "LoRA-One", "init.scale": "stable", "init.stable_gamma": 128.0,
                            "init.iters": 8, "init.bsz": 1, "init.max_length": 1024}),
        ("+init=gradient ++init.scale=gd", {"init.scale": "gd", "init.stable_gamma": None}),
        ("+init=gradient ++init.direction=LoRA-GA", {"init.direction": "ArB2r", "init.stable_gamma": 128.0}),
        ("+init=gradient ++init.direction=ArBr ++init.norm_clip=true", {"init.direction": "ArBr",
                                                                       "init.norm_clip": True}),
        ("+init=gradient ++init.dtype=fp32", {"init.mode": "gradient"}),
        ("++wandb.name=a/b", {"run_dir": "runs/a/b"}),
        ("++wandb.name=7", {"run_dir": "runs/7"}),
        ("++wandb.name=2e-4", {"run_dir": "runs/2e-4"}),
        ("++wandb.name=true", {"run_dir": "runs/true"}),
        ("++wandb.name=a run_dir=elsewhere", {"run_dir": "elsewhere"}),
        ("train.steps=3", {"train.steps": 3, "train.epochs": None}),
        ("train.eval_every=3 train.checkpoint_every=4", {"train.eval_every": 3, "train.eval_epochs": None,
                                                         "train.checkpoint_every": 4}),
        ("optim.schedule=cosine optim.warmup=0.03", {"optim.schedule": "cosine", "optim.warmup": 0.03}),
        ("data.eval_size=5 threads=1 eval.before=true", {"data.eval_size": 5, "threads": 1, "eval.before": True}),
    ],
)  # fmt: skip
def test_a_key_means_what_it_meant(words: str, expected: dict[str, Any]) -> None:
    config = config_of(f"{BASE} {words}")
    assert {name: at(config, name) for name in expected} == expected


@pytest.mark.matrix(4, each_word=False)
@pytest.mark.parametrize("key", PUBLISHED_KEYS)
def test_every_key_can_be_given(key: str) -> None:
    samples = {"init.lora_A": "xavier", "init.lora_B": "unit", "init.direction": "LoRA-One", "init.scale": "stable"}
    samples |= {"init.mode": "gradient", "init.dtype": "fp32", "model.type": "CausalLM", "dataset_name": "meta_math"}
    samples |= {"peft.lora_target_modules": "all", "peft.lora_r": "2", "peft.lora_dropout": "0.1"}
    samples |= dict.fromkeys(("peft.adalora", "peft.dora", "peft.use_loraplus", "peft.train_embeddings"), "false")
    samples |= dict.fromkeys(("model.bf16", "model.saving", "peft.use_peft", "init.norm_clip", "dry_run"), "true")
    samples |= dict.fromkeys(("peft.use_rslora", "gradient_checkpointing"), "true") | {"peft.lora_relative_r": "null"}
    value = samples.get(key, "32")
    compose_published([*BASE.split(), "+init=gradient", f"++{key}={value}"])


def test_the_options_have_no_key_that_is_not_in_the_table() -> None:
    named = {
        f"{group}.{key}"
        for group in GROUPS
        for option in options(group)
        for key in yaml.safe_load((FOLDER / group / f"{option}.yaml").read_text(encoding="utf-8"))
    }
    assert named <= PUBLISHED_KEYS.keys()


def test_several_processes_share_the_real_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafa.scripts.run_exp.world_size", lambda: 2)
    assert config_of(BASE).train.accumulation == 16
    with pytest.raises(ConfigError, match=r"size=3 is no multiple of model.per_device_batch_size=1 on each of 2 proc"):
        config_of(f"{BASE} ++model.real_batch_size=3")


def test_a_relative_rank_is_a_share_of_the_first_linear_layer(tmp_path: Path) -> None:
    model = make_workplace(tmp_path, hidden_size=48) / "model"
    config = config_of(f"+peft=all ++peft.lora_relative_r=0.07 ++model.name={model}")
    assert config.peft.r == int(48 * 0.07) == 3
    with pytest.raises(ConfigError, match=r"peft\.lora_relative_r=0\.01 of 48 is a rank below 1\. Give at least 0\.02"):
        config_of(f"+peft=all ++peft.lora_relative_r=0.01 ++model.name={model}")


@pytest.mark.skipif(not FULL, reason="training without an adapter, peft.full, is not here yet")
def test_without_peft_all_weights_are_trained() -> None:
    assert config_of("+peft=full_ft").peft.full is True  # type: ignore[attr-defined]
    assert notes_of("+peft=full_ft ++peft.lora_r=8")[0].startswith("peft.lora_r=8 changes nothing: there is no adapter")


# ---- keys that change nothing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("++model.early_stopping_patience=5", "the published training never acts on it; train.patience does"),
        ("++model.prec_reg=1e-3", "it belongs to the preconditioned optimizer, which is optim=preconditioned"),
        ("++wandb.entity=us", "W&B is told by its variable WANDB_ENTITY"),
        ("+init=svd ++init.bsz=2", "+init=svd does not read it"),
        ("+init=gaussian ++init.stable_gamma=4", "it is the gamma of init.scale=stable, and that is default"),
        ("+init=gradient ++init.norm_clip=true", "this start takes nothing out of the base"),
        ("+init=gradient ++init.lora_A=unit", "+init=gradient does not read it"),
    ],
)
def test_a_key_without_effect_is_taken_and_said(words: str, note: str) -> None:
    (said,) = notes_of(f"{BASE} {words}")
    assert said.startswith(words.split()[-1].lstrip("+").partition("=")[0])
    assert note in said


# ---- the traps of the published code --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    [*(f"+init={one} +peft=all" for one in options("init")), "model=tinyllama +init=svd +peft=qv",
     *(f"+init=kaiming +peft={one}" for one in ("qv", "dora", "all_w_emb", "qv_w_emb"))],
)  # fmt: skip
def test_no_option_lacks_a_key_that_is_read(choice: str) -> None:
    """There every start but one raises for a missing direction, and models and adapters lack keys."""
    config_of(f"{choice} ++peft.lora_r=4")


def test_nothing_wants_a_gpu_or_an_account() -> None:
    config = config_of(BASE)
    assert config.model.attention == "auto"
    assert config.run_dir is None


@pytest.mark.parametrize(
    ("option", "name", "rate", "dtype", "length"),
    [
        ("t5base", "t5-base", 1e-4, "float32", 128),
        ("t5small", "t5-small", 5e-5, "bfloat16", 128),
        ("t5large ++model.real_batch_size=32", "t5-large", 5e-5, "bfloat16", 128),
        ("t5xl", "google/flan-t5-xl", 5e-5, "bfloat16", 512),
    ],
)
def test_models_with_encoder_and_decoder_read_x_and_write_y(
    option: str, name: str, rate: float, dtype: str, length: int
) -> None:
    config = config_of(f"{BASE} model={option} ++dataset_name=sst2 data.file=copy.jsonl")
    assert (config.model.name, config.model.kind, config.model.dtype) == (name, "seq2seq", dtype)
    assert (config.data.template, config.data.max_length, config.optim.lr) == (None, length, rate)
    assert config_of(f"{BASE} model=tinyllama").model.kind == "auto"


def test_a_relative_rank_of_t5_is_a_share_of_its_first_linear_layer(tmp_path: Path) -> None:
    model = make_t5(tmp_path, d_model=24) / "model"
    words = f"model=t5base +peft=all ++peft.lora_relative_r=0.25 ++model.name={model}"
    assert config_of(words).peft.r == 4  # heads x d_kv is 16


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ("", ConfigError, r"Nothing says what is adapted\. Add \+peft=<option>: adalora, all, all_w_emb, dora, full_f"),
        ("+peft=all", ConfigError, r"One of peft\.lora_r and peft\.lora_relative_r says .* neither is set\. Give exac"),
        (f"{BASE} ++peft.lora_relative_r=0.1", ConfigError, r"lora_r=4 and peft\.lora_relative_r=0\.1 both are set"),
        ("+peft=al ++peft.lora_r=4", ConfigError, r"peft has no option 'al'\. Did you mean 'all'\? Known: adalora,"),
        (f"{BASE} model=gpt2", ConfigError, r"model has no option 'gpt2'.* is given as \+\+model\.name=<folder or Hub"),
        (f"{BASE} ++model.type=Seq2Seq", ConfigError, r"model\.type has no value 'Seq2Seq'\. Pass one of: 'CausalLM'"),
        (f"{BASE} model=t5large", ConfigError, r"real_batch_size=1 is no multiple of model\.per_device_batch_size=32"),
        ("+peft=adalora ++peft.lora_r=4", NotAvailableError, "AdaLoRA, whose ranks change while it trains, is not her"),
        (f"{BASE} ++peft.adalora=true", NotAvailableError, r"AdaLoRA"),
        (f"{BASE} ++init.dtype=bf16", NotAvailableError, r"trained in float32 here, found init\.dtype=bf16\. Drop it"),
        (f"{BASE} ++model.epoch=1", ConfigError, r"run_exp\.py has no key 'model\.epoch'\. Did you mean 'model\.epoch"),
        (f"{BASE} ++peft.r=8", ConfigError, r"has no key 'peft\.r'\. Did you mean 'peft\.lora_r'\? docs/published-com"),
        (f"{BASE} ++learning_rate=8", ConfigError, r"Did you mean 'model\.learning_rate'\?"),
        (f"{BASE} data=mine.jsonl", ConfigError, r"has no key 'data'\. Did you mean 'dataset_name'\?"),
        (f"{BASE} ++wandb.name=", ConfigError, r"wandb\.name= is followed by nothing\. Was a variable of the shell no"),
        (f"{BASE} ++wandb.name=../up", ConfigError, r"wandb\.name=\.\./up is the name of a run, whose directory is ru"),
        (f"{BASE} ++seed=[1", ConfigError, r"The value of '\+\+seed=\[1' cannot be read"),
        (f"{BASE} ++seed=1,2", ConfigError, r"names several values, but a run has one\. Add -m for a run of each"),
        (f"{BASE} hydra/launcher=joblib", ConfigError, r"says how a sweep is launched, and this is one run\. Add -m"),
        (f"{BASE} ++seed", ConfigError, r"'\+\+seed' is not a setting\. Write key=value, for example \+\+peft\.lora_r"),
        (f"{BASE} ~seed=1", ConfigError, "is not a setting"),
        (f"{BASE} ++model.epochs=two", ConfigError, r"train\.epochs must be .* found 'two'.* model\.epochs is train\."),
        (f"{BASE} ++model.bf16=yes", ConfigError, r"model\.bf16 must be True or False, found 'yes'"),
        (f"{BASE} ++model.real_batch_size=4.5", ConfigError, r"model\.real_batch_size must be an integer >= 1"),
        (f"{BASE} ++model.eval_epochs=0", ConfigError, r"model\.eval_epochs must be a number > 0, or null"),
        (f"{BASE} ++model.real_batch_size=4 ++model.per_device_batch_size=3", ConfigError, r"Give a multiple of 3"),
        (f"{BASE} ++peft.lora_target_modules=null", ConfigError, r"nothing would be adapted\. Give all, a list of nam"),
        (f"{BASE} ++peft.lora_target_modules={{a:1}}", ConfigError, r"no published command has: \{'a'"),
        (f"{BASE} ++init.mode=lora_da", ConfigError, r"init\.mode .*lora_da"),
        (f"{BASE} +init=svd ++init.scale=big", ConfigError, r"init\.scale .*'big'"),
        (f"{BASE} +init=gradient ++init.direction=up", ConfigError, r"init\.direction must be one of LoRA-One, LoRA-F"),
        (f"{BASE} +init=gaussian ++init.lora_A=gaussian", ConfigError, r"Add \+\+init\.lora_A_std=0\.02"),
        (f"{BASE} ++init.lora_A=zeros", ConfigError, "lora_A and lora_B are both zeros"),
        (f"{BASE} ++dataset_name=metamath", ConfigError, r"no data set 'metamath'\. Did you mean 'meta_math'\? Give d"),
        (f"{BASE} ++dataset_name=svhn", NotAvailableError, r"svhn is a data set of images, and run_exp\.py trains lan"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_with_what_to_do(words: str, kind: type[LoraError], message: str) -> None:
    with pytest.raises(kind, match=message):
        compose_published(words.split())


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_data_set_of_text_is_taken_and_written_with_a_blank_before_the_answer(name: str) -> None:
    config = config_of(f"{BASE} ++dataset_name={name} data.file=copy.jsonl")
    assert (config.data.name, config.data.template, config.data.own.file) == (name, "spaced", "copy.jsonl")


@pytest.mark.parametrize("name", IMAGES)
def test_data_sets_of_images_are_refused_by_name(name: str) -> None:
    with pytest.raises(NotAvailableError, match=f"dataset_name={name} is a data set of images"):
        config_of(f"{BASE} ++dataset_name={name}")


# ---- the directory of a run -----------------------------------------------------------------------------------------


def test_a_name_is_used_again_for_the_same_settings_and_numbered_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = f"{BASE} ++wandb.name=one".split()
    first = config_of(" ".join(words))
    assert placed(first, words) == first
    RunDirectory.create(Path("runs/one"), first)
    assert placed(first, words) == replace(first, if_exists="resume")
    other = config_of(f"{BASE} ++wandb.name=one ++seed=1")
    assert placed(other, words) == replace(other, run_dir="runs/one-2")
    RunDirectory.create(Path("runs/one-2"), other)
    assert placed(other, words) == replace(other, run_dir="runs/one-2", if_exists="resume")
    said = [*words, "if_exists=new"]
    assert placed(first, said) == first
    unnamed = config_of(BASE)
    assert placed(unnamed, BASE.split()) == unnamed
    monkeypatch.setattr(record, "NUMBERS", 3)
    with pytest.raises(ConfigError, match=r"All of runs/one to one-2 are taken\. Give another wandb\.name"):
        placed(config_of(f"{BASE} ++wandb.name=one ++seed=2"), words)


# ---- the page -------------------------------------------------------------------------------------------------------


def test_help_loads_what_it_shows_and_nothing_else() -> None:
    code = (
        "import sys\nfrom lorafa.scripts.run_exp import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'hydra', 'rich', 'yaml'} & sys.modules.keys()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "peft.lora_relative_r" in shown


def test_the_page_has_the_table_and_help_every_key() -> None:
    page = (ROOT / "docs" / "published-commands.md").read_text(encoding="utf-8")
    for name, key in PUBLISHED_KEYS.items():
        here = "(nothing)" if key.dead else ", ".join(f"`{one}`" for one in key.ours.split(", ")) if key.ours else ""
        assert f"| `{name}` | {here} | {key.means} |" in page
        assert re.search(rf"^  {re.escape(name)} ", keys_help(), flags=re.MULTILINE)
    shown = page.replace("\\\n", "").replace("$runname", "one").replace("$iters", "8")
    assert COMMAND.split() == shown.partition("run_exp.py -m")[2].partition("```")[0].split()
