"""From key=value on the command line to a checked config: what is accepted, and what every mistake gets."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import yaml

import lorafa.train.settings.run as schema
from lorafa import LoraConfig
from lorafa.conf.compose import ALIASES, CUSTOM, KEYS, OPEN_GROUPS, compose, groups
from lorafa.errors import ConfigError
from lorafa.initializers.settings import START_SETTINGS
from lorafa.settings.methods import BdLoraConfig, LoraRuntimeConfig, VeloraConfig
from lorafa.settings.typed import build, expected, field_docs, keys, plain
from lorafa.train.recipe import lora_config
from lorafa.train.settings.align import CYCLIC_FIELDS
from lorafa.train.settings.run import RunConfig

SOURCE = Path(schema.__file__).parents[2]


DEFAULTS: dict[str, Any] = {
    "model": {"name": "smollm2-135m", "revision": None, "dtype": "bfloat16", "attention": "auto", "cache_dir": None,
              "quantize": None, "check_memory": True, "trust_remote_code": False, "add_tokens": None, "kind": "auto"},
    "data": {"name": "word_problems", "train_size": 1600, "eval_size": 100, "eval_file": None, "max_length": 512,
             "template": None, "seed": 0, "weights": None, "cache": None, "templates": 24, "cache_dir": None},
    "init": {"mode": "default", "bsz": 1, "iters": 8, "max_length": 1024, "passes": 1, "ranks": None, "r_min": None,
             "r_max": None},
    "optim": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.0, "warmup": 0.05, "shorten_warmup": False,
              "schedule": "linear", "max_grad_norm": 1.0, "betas": [0.9, 0.999], "eps": 1e-8},
    "eval": {"name": "gsm8k", "before": True, "batch_size": 32, "forgetting": False, "size": 64, "max_new_tokens": None,
             "extract": "number", "published": False},
    "run_dir": None,
    "threads": None,
}  # fmt: skip
"""What the default run has been made with since there are numbers of it."""


def test_the_default_run_is_the_one_it_was() -> None:
    found = plain(compose())
    assert {group: found[group] for group in DEFAULTS} == DEFAULTS
    assert {name: found["train"][name] for name in ("steps", "epochs", "batch_size", "accumulation", "seed")} == {
        "steps": 80, "epochs": None, "batch_size": 8, "accumulation": 1, "seed": 0,
    }  # fmt: skip
    adapter = lora_config(compose())
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout, adapter.target_modules) == (16, 32, 0.05, "all-linear")
    assert adapter.to_dict() == LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", init_seed=0
    ).to_dict()  # fmt: skip


def test_every_field_of_lora_config_can_be_reached() -> None:
    """Through peft, or through the group it is about; the rest are records that the library writes."""
    elsewhere = {"init_lora_weights", *START_SETTINGS} | {"init_seed", "task_type", "revision"}
    records = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode"}
    reached = {field.name for field in fields(schema.PeftConfig)} - set(schema.PeftConfig.in_its_place)
    assert reached | elsewhere | records == {field.name for field in fields(LoraConfig)}
    assert not reached & (elsewhere | records)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("peft.lora_alpha=0.5", "lora_alpha", 0.5),
        ("peft.target_modules=null", "target_modules", None),
        ("peft.alpha_pattern={q_proj:4,v_proj:0.5}", "alpha_pattern", {"q_proj": 4, "v_proj": 0.5}),
        ("peft.trainable_token_indices=[1,2]", "trainable_token_indices", [1, 2]),
        ("peft.trainable_token_indices={embed:[1]}", "trainable_token_indices", {"embed": [1]}),
        ("peft.layer_replication=[[0,4],[2,6]]", "layer_replication", [(0, 4), (2, 6)]),
        ("peft.ensure_weight_tying=true", "ensure_weight_tying", True),
        ("peft.use_bdlora.nblocks=2", "use_bdlora", BdLoraConfig(nblocks=2)),
        ("peft.velora_config={}", "velora_config", VeloraConfig()),
        ("peft.runtime_config.ephemeral_gpu_offload=true", "runtime_config", LoraRuntimeConfig(True)),
        ("peft.megatron_config={a:{b:1}}", "megatron_config", {"a": {"b": 1}}),
        ("model.revision=v1", "revision", "v1"),
    ],
)
def test_a_field_of_lora_config_is_set_by_its_name(override: str, field: str, value: object) -> None:
    config = compose([override])
    assert getattr(lora_config(config), field) == value
    assert build(RunConfig, yaml.safe_load(yaml.safe_dump(plain(config)))) == config


def test_a_value_is_set_and_the_others_keep_their_defaults() -> None:
    changed, default = plain(compose(["peft.r=32"])), plain(compose())
    assert changed["peft"].pop("r") == 32
    default["peft"].pop("r")
    assert changed == default


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_plus_sign_changes_nothing_because_the_schema_is_closed(sign: str) -> None:
    assert compose([f"{sign}init=pissa", f"{sign}peft.r=4"]) == compose(["init=pissa", "peft.r=4"])


def test_the_order_of_a_group_and_its_keys_does_not_matter() -> None:
    assert compose(["peft.r=4", "peft=dora"]) == compose(["peft=dora", "peft.r=4"])


def test_of_two_values_the_later_one_counts() -> None:
    assert compose(["peft.r=4", "peft.r=8"]).peft.r == 8
    assert compose(["model=a/b", "data=mine.jsonl", "+data=gsm8k", "model=smollm2-135m"]) == compose(["data=gsm8k"])


def test_a_choice_that_a_later_one_replaces_is_checked_all_the_same() -> None:
    with pytest.raises(ConfigError, match="peft has no option 'dorra'"):
        compose(["peft=dorra", "peft=lora"])


@pytest.mark.parametrize("path", ["~/runs/x", "a(b", "it's", "runs/[1], 2"])
def test_paths_need_no_quotes_inside_the_quotes(path: str) -> None:
    assert compose([f"run_dir={path}"]).run_dir == path
    assert compose([f"train.resume='{path}'" if "'" not in path else f"train.resume={path}"]).train.resume == path


def test_null_and_quotes_keep_their_meaning_for_paths() -> None:
    assert compose(["run_dir=null"]).run_dir is None
    assert compose(["run_dir='a b'"]).run_dir == "a b"


@pytest.mark.parametrize("group", ["model", "data"])
@pytest.mark.parametrize("name", ["owner/name", "/data/a b/it's (1).jsonl", "back\\slash\\", "a=b", "x'\\'y"])
def test_model_and_data_take_any_name_literally(group: str, name: str) -> None:
    assert getattr(compose([f"{group}={name}"]), group).name == name


def test_own_data_are_not_cut_to_the_size_of_the_default_task() -> None:
    assert compose(["data=mine.jsonl"]).data.train_size is None


@pytest.mark.parametrize(("group", "option"), [(g, o) for g, options in groups().items() for o in options])
def test_every_option_of_every_group_makes_a_config(group: str, option: str) -> None:
    named = {"external": ["align.teacher=x"], "from_teacher": ["init.teacher=x"], CUSTOM: [f"{group}.name=x"]}
    assert isinstance(compose([f"{group}={option}", *named.get(option, [])]), RunConfig)


def test_names_of_other_documents_are_understood() -> None:
    assert compose(["++peft.lora_r=8"]).peft.r == 8
    assert set(ALIASES.values()) <= {*KEYS, *OPEN_GROUPS}


def test_lists_mappings_and_null_are_values() -> None:
    config = compose(["peft.target_modules=[q_proj,v_proj]", "peft.rank_pattern={q_proj:4}", "optim.betas=[0.8,0.9]"])
    assert config.peft.target_modules == ["q_proj", "v_proj"]
    assert config.peft.rank_pattern == {"q_proj": 4}
    assert config.optim.own.betas == (0.8, 0.9)
    assert compose(["train.steps=null", "train.epochs=2"]).train.epochs == 2.0


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs"),
    [
        ("train.epochs=1", None, 1.0),
        ("train.steps=7", 7, None),
        ("train=epoch train.steps=7", 7, None),
        ("train=epoch", None, 1.0),
        ("train.steps=7 train.epochs=2 train.steps=null", None, 2.0),
        ("train.epochs=null", 80, None),
    ],
)
def test_one_of_steps_and_epochs_is_enough(overrides: str, steps: int | None, epochs: float | None) -> None:
    train = compose(overrides.split()).train
    assert (train.steps, train.epochs) == (steps, epochs)
    assert schema.TrainConfig(epochs=2).steps is None


def test_a_config_goes_through_plain_values_unchanged() -> None:
    config = compose(["peft.target_modules=[a,b]", "threads=2", "optim.betas=[0.5,0.6]"])
    assert build(RunConfig, plain(config)) == config


def test_a_path_is_taken_for_a_text_and_written_as_one(tmp_path: Path) -> None:
    config = build(RunConfig, {"run_dir": tmp_path, "model": {"cache_dir": tmp_path / "cache"}})
    assert (config.run_dir, config.model.cache_dir) == (str(tmp_path), str(tmp_path / "cache"))
    assert plain({"run_dir": tmp_path}["run_dir"]) == str(tmp_path)
    assert plain(RunConfig(run_dir=tmp_path))["run_dir"] == str(tmp_path)  # type: ignore[arg-type]


def test_a_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        compose().peft.r = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("peft.rr=3", r"There is no setting 'peft.rr'. Did you mean 'peft.r'\? `lorafa train --help` lists"),
        ("lr=1", r"There is no setting 'lr'. Did you mean 'optim.lr'\?"),
        (
            "init.mode=pisa",
            r"init.mode has no value 'pisa'. Did you mean 'pissa'\? Known: both_random, corda, default, ",
        ),
        ("init=gradient init.norm_clip=true", "norm_clip would change nothing: it limits what is taken out of the bas"),
        ("init=gradient init.direction=x", "init.direction must be one of LoRA-One, LoRA-FA, ArB2r, "),
        (
            "init.angle=x",
            r"no setting 'init.angle' for init=default \(found 'x'\)\. init=default has: mode, bsz,",
        ),
        ("peft=dorra", r"peft has no option 'dorra'. Did you mean 'dora'\? Known: dora, full_ft"),
        ("peft.r=a", r"peft.r must be an integer, found 'a' \(str\). Write peft.r=8 for example."),
        ("peft.r='8'", r"peft.r must be an integer, found '8' \(str\)"),
        ("peft.r=true", r"peft.r must be an integer, found True \(bool\)"),
        ("peft.r=8.0", r"peft.r must be an integer, found 8.0 \(float\)"),
        ("peft.use_dora=1", r"peft.use_dora must be true or false, found 1 \(int\)"),
        ("peft.target_modules=[1]", r"must be a text or a list \[a, b\] of texts or null, found \[1\]"),
        ("peft.rank_pattern={q:x}", r"must be a mapping \{name: value\} of integers"),
        ("optim.name=adam", r"optim.name has no value 'adam'. Did you mean 'adamw'\? Pass one of: 'adafactor', "),
        ("optim.betas=[0.9]", r"optim.betas must be a list of 2 numbers, found \[0.9\]"),
        ("optim.betas=[0.9,1]", r"optim.betas must be two numbers in \[0, 1\), found 1.0"),
        ("optim.lrr=1", r"no setting 'optim.lrr' for optim=adamw \(found 1\)\. Did you mean 'lr'\? optim=adamw has: "),
        ("data.templtes=1", r"no setting 'data.templtes' for data=word_problems .* Did you mean 'templates'\?"),
        ("eval.sise=1", r"no setting 'eval.sise' for eval=gsm8k .* Did you mean 'size'\?"),
        ("model.nmae=x", r"no setting 'model.nmae' for model=smollm2-135m .* Did you mean 'name'\?"),
        ("eval=gsm9k", r"eval has no option 'gsm9k'. Did you mean 'gsm8k'\? Known: accuracy, commonsense, default"),
        ("peft.use_bdlora={nblocks:0}", r"peft.use_bdlora.nblocks must be an integer >= 1, found 0"),
        (
            "peft.use_bdlora.nblock=2",
            r"no setting 'peft.use_bdlora.nblock'. Did you mean 'peft.use_bdlora.nblocks'",
        ),
        ("optim.lr=0", "optim.lr is 0, so nothing would be learned. Give a number > 0"),
        ("optim.lr=-1", "optim.lr must be a number >= 0, found -1.0"),
        ("optim.warmup=-1", "optim.warmup must be a number >= 0"),
        ("data.name=12", r"data.name must be a text or a list \[a, b\] of texts, found 12 \(int\)"),
        ("data.eval_size=-1", "data.eval_size must be an integer >= 0, found -1"),
        ("data.max_length=1", "data.max_length must be an integer >= 2"),
        ("train.steps=0", "train.steps must be an integer >= 1, found 0"),
        ("train.batch_size=0", "train.batch_size must be an integer >= 1"),
        ("train.epochs=1 train.steps=9", r"train.steps=9 and train.epochs=1 both say how long .* Give one of the two"),
        ("train.steps=null", r"Nothing says how long the training is\. Give train\.steps, or train\.epochs=1 for"),
        ("eval.max_new_tokens=0", "eval.max_new_tokens must be an integer >= 1"),
        ("eval.extract=upsteam", r"must be one of number, upstream, found 'upsteam' \(str\). Did you mean 'upstream'"),
        ("threads=0", "threads must be an integer >= 1"),
        ("peft", "'peft' is not a setting. Write key=value, for example peft.r=16."),
        ("~peft", "'~peft' is not a setting"),
        ("peft.r=1,2", "'peft.r=1,2' names several values, but a run has one"),
        (
            "peft.target_modules=.*(q",
            r"cannot be read: [^.]*\. Close its brackets, or .* quotes: \"peft.target_modules='\.\*\(q'\"\.",
        ),
        ("optim.lr=1e-4x", r"optim.lr must be a number or null, found '1e-4x' \(str\). Write optim.lr=0.5 for example"),
        ("run_dir=", r"run_dir must be a text or null, found '' \(str\). Write run_dir=name"),
        ("train.resume=", r"train.resume must be a text or null, found '' \(str\)"),
        ("peft.target_modules=['']", r"must be a text or a list \[a, b\] of texts or null, found \[''\]"),
        ("model=", "model= is followed by nothing. Name a folder, a Hub id, or one of: minilm-l6, smollm2-135m."),
        ("data= ", r"data= is followed by nothing. Name a file, a folder, a Hub id, \[several,of,them\], or one of"),
        ("train.seed=4294967296", "train.seed must be an integer <= 4294967295, found 4294967296. Give a smaller one"),
        ("threads=100000", "threads must be an integer <= 1024, found 100000"),
        ("optim.warmup=80", r"optim.warmup=80 steps are the whole training \(train.steps=80\), so .*optim.warmup=0.05"),
        ("report_project=${nope}", "do not fit together: Interpolation key 'nope' not found"),
        ("data=custom", "data.name has no value. Add data.name=<value>."),
    ],
)
def test_a_wrong_setting_says_what_was_expected(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(override.split(" ") if override != "data= " else [override])


def test_keeping_the_best_needs_checkpoints() -> None:
    with pytest.raises(ConfigError, match=r"chooses among checkpoints, but train.checkpoint_every is 0. Set"):
        compose(["train.keep_best=true", "train.checkpoint_every=0"])


def test_unknown_keys_of_a_file_are_refused_with_their_group() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'optim.lrr' for optim=adamw \(found 1\). Did you mean 'lr'\?"):
        build(RunConfig, {"optim": {"lrr": 1}})
    with pytest.raises(ConfigError, match="optim is a group of settings, found 3"):
        build(RunConfig, {"optim": 3})


def test_every_setting_has_a_text() -> None:
    assert [key.name for key in keys(RunConfig) if not key.doc] == []


def test_the_text_of_a_setting_is_what_stands_under_it() -> None:
    assert field_docs(schema.OptimConfig)["max_grad_norm"].startswith("Gradients longer than this are shortened")


@dataclass(frozen=True)
class Odd:
    choice: Literal["a", "b"] | None = None


def test_types_are_put_into_words() -> None:
    assert expected(get_type_hints(Odd)["choice"]) == "one of a, b or null"
    assert build(Odd, {"choice": "b"}) == Odd("b")
    with pytest.raises(ConfigError, match="choice must be one of a, b or null, found 'c'"):
        build(Odd, {"choice": "c"})


# ---- every key is read by something ---------------------------------------------------------------------------------

SCHEMA = {name: cls for name, cls in vars(schema).items() if str(getattr(cls, "group", None)) in groups()}
SCHEMA |= {name: getattr(schema, name) for name in ("PeftConfig", "TrainConfig", "RunConfig")}


def _reads(function: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """(schema class, field) for every attribute the function takes from a value it knows to be of a schema class."""
    known: dict[str, Any] = {
        arg.arg: SCHEMA[arg.annotation.id]
        for arg in (*function.args.args, *function.args.kwonlyargs)
        if isinstance(arg.annotation, ast.Name) and arg.annotation.id in SCHEMA
    }

    def type_of(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.Call):  # compose(...), run.config()
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            return RunConfig if name in ("compose", "config") else None
        if isinstance(node, ast.Attribute) and (owner := type_of(node.value)) is not None:
            hint = get_type_hints(owner).get(node.attr)
            return hint if is_dataclass(hint) else None
        return None

    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            values = value.elts if isinstance(value, ast.Tuple) else [value]
            if len(names) == len(values):
                known |= {n.id: type_of(v) for n, v in zip(names, values, strict=True) if isinstance(n, ast.Name)}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and (owner := type_of(node.value)) is not None:
            yield owner.__name__, node.attr


def test_every_setting_is_read_by_something() -> None:
    files = [path for path in SOURCE.rglob("*.py") if path != Path(schema.__file__)]
    assert any(path.name == "recipe.py" for path in files)
    functions = [
        node
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    read = {found for function in functions for found in _reads(function)}
    adapter = {field.name for field in fields(LoraConfig)}
    read |= {("PeftConfig", field.name) for field in fields(schema.PeftConfig) if field.name in adapter}  # all of them
    read |= {("ModelConfig", "own")}  # holds nothing
    read |= {("AlignConfig", name) for name in CYCLIC_FIELDS}  # one after another
    declared = {(name, field.name) for name, cls in SCHEMA.items() for field in fields(cls)}
    assert declared - read == set()
