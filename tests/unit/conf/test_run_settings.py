"""From key=value on the command line to a checked config: what is accepted, and what every mistake gets."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest

import lorafa.train.schema as schema
from lorafa.conf.compose import ALIASES, KEYS, compose, groups
from lorafa.conf.typed import build, expected, field_docs, keys, plain
from lorafa.errors import ConfigError
from lorafa.train.init_config import InitConfig
from lorafa.train.recipe import lora_config
from lorafa.train.schema import RunConfig
from toys.places import ROOT

SOURCE = Path(schema.__file__).parents[1]


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
    name = [f"{group}.name=x"] if option == "custom" else []
    assert isinstance(compose([f"{group}={option}", *name]), RunConfig)


def test_names_of_published_commands_are_understood() -> None:
    assert compose(["++peft.lora_r=8"]).peft.r == 8
    assert compose(["++dataset_name=openai/gsm8k"]).data.name == "openai/gsm8k"
    assert set(ALIASES.values()) <= set(KEYS)


def test_lists_mappings_and_null_are_values() -> None:
    config = compose(["peft.target_modules=[q_proj,v_proj]", "peft.rank_pattern={q_proj:4}", "optim.betas=[0.8,0.9]"])
    assert config.peft.target_modules == ["q_proj", "v_proj"]
    assert config.peft.rank_pattern == {"q_proj": 4}
    assert config.optim.betas == (0.8, 0.9)
    assert compose(["train.steps=null", "train.epochs=2"]).train.epochs == 2.0


def test_a_config_goes_through_plain_values_unchanged() -> None:
    config = compose(["peft.target_modules=[a,b]", "threads=2", "optim.betas=[0.5,0.6]"])
    assert build(RunConfig, plain(config)) == config


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
            r"init.mode has no value 'pisa'. Did you mean 'pissa'\? Known: default, gradient, ",
        ),
        ("init.direction=x", "init.direction must be one of LoRA-One, LoRA-FA, ArB2r, "),
        ("init.angle=x", "There is no setting 'init.angle'."),
        ("peft=dorra", r"peft has no option 'dorra'. Did you mean 'dora'\? Known: dora, lora"),
        ("peft.r=a", r"peft.r must be an integer, found 'a' \(str\). Write peft.r=8 for example."),
        ("peft.r='8'", r"peft.r must be an integer, found '8' \(str\)"),
        ("peft.r=true", r"peft.r must be an integer, found True \(bool\)"),
        ("peft.r=8.0", r"peft.r must be an integer, found 8.0 \(float\)"),
        ("peft.use_dora=1", r"peft.use_dora must be true or false, found 1 \(int\)"),
        ("peft.target_modules=[1]", r"must be a text or a list \[a, b\] of texts, found \[1\]"),
        ("peft.rank_pattern={q:x}", r"must be a mapping \{name: value\} of integers"),
        ("optim.name=adam", r"must be one of adamw, .*, found 'adam' \(str\). Did you mean 'adamw'\?"),
        ("optim.betas=[0.9]", r"optim.betas must be a list of 2 numbers, found \[0.9\]"),
        ("optim.betas=[0.9,1]", r"optim.betas must be two numbers in \[0, 1\), found 1.0"),
        ("optim.lr=0", "optim.lr must be a number > 0, found 0.0"),
        ("optim.warmup=-1", "optim.warmup must be a number >= 0"),
        ("data.name=12", r"data.name must be a text, found 12 \(int\)"),
        ("data.eval_size=0", "data.eval_size must be an integer >= 1, found 0"),
        ("data.max_length=1", "data.max_length must be an integer >= 2"),
        ("train.steps=0", "train.steps must be an integer >= 1, found 0"),
        ("train.batch_size=0", "train.batch_size must be an integer >= 1"),
        ("train.epochs=1", r"train.steps or train.epochs, found steps=\d+ and epochs=1.0. Set one and make the other"),
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
        ("optim.lr=1e-4x", r"optim.lr must be a number, found '1e-4x' \(str\). Write optim.lr=0.0002 for example"),
        ("run_dir=", r"run_dir must be a text or null, found '' \(str\). Write run_dir=name"),
        ("train.resume=", r"train.resume must be a text or null, found '' \(str\)"),
        ("peft.target_modules=['']", r"must be a text or a list \[a, b\] of texts, found \[''\]"),
        ("model=", "model= is followed by nothing. Name a folder, a Hub id or smollm2-135m."),
        ("data= ", "data= is followed by nothing. Name a file, a Hub id or word_problems."),
        ("train.seed=4294967296", "train.seed must be an integer <= 4294967295, found 4294967296. Give a smaller one"),
        ("threads=100000", "threads must be an integer <= 1024, found 100000"),
        ("optim.warmup=80", r"optim.warmup=80 steps are the whole training \(train.steps=80\), so .*optim.warmup=0.05"),
        ("run_dir=${nope}", "do not fit together: Interpolation key 'nope' not found"),
        ("data=custom", "data.name has no value. Add data.name=<value>."),
    ],
)
def test_a_wrong_setting_says_what_was_expected(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([override])


def test_keeping_the_best_needs_checkpoints() -> None:
    with pytest.raises(ConfigError, match=r"chooses among checkpoints, but train.checkpoint_every is 0. Set"):
        compose(["train.keep_best=true", "train.checkpoint_every=0"])


def test_unknown_keys_of_a_file_are_refused_with_their_group() -> None:
    with pytest.raises(ConfigError, match=r"There is no setting 'optim.lrr' \(found 1\). Did you mean 'lr'\?"):
        build(RunConfig, {"optim": {"lrr": 1}})
    with pytest.raises(ConfigError, match="optim is a group of settings, found 3"):
        build(RunConfig, {"optim": 3})


def test_every_setting_has_a_text() -> None:
    assert [key.name for key in keys(RunConfig) if not key.doc] == []


def test_the_text_of_a_setting_is_what_stands_under_it() -> None:
    assert field_docs(schema.OptimConfig)["lr"] == "Highest learning rate."


@dataclass(frozen=True)
class Odd:
    choice: Literal["a", "b"] | None = None


def test_types_are_put_into_words() -> None:
    assert expected(get_type_hints(Odd)["choice"]) == "one of a, b or null"
    assert build(Odd, {"choice": "b"}) == Odd("b")
    with pytest.raises(ConfigError, match="choice must be one of a, b or null, found 'c'"):
        build(Odd, {"choice": "c"})


# ---- every key is read by something ---------------------------------------------------------------------------------

SCHEMA = {name: cls for name, cls in vars(schema).items() if is_dataclass(cls)}


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
    functions = [
        node
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    read = {found for function in functions for found in _reads(function)}
    by_name = {"OptimConfig"}  # a table says whose its settings are: integration/test_optimizer_settings.py tries them
    declared = {(name, field.name) for name, cls in SCHEMA.items() if name not in by_name for field in fields(cls)}
    assert declared - read == set()


# ---- starts ---------------------------------------------------------------------------------------------------------

DOCUMENTED = (
    "+init=gradient ++init.direction=LoRA-FA ++init.scale=stable ++init.stable_gamma=128 ++init.bsz=1 ++init.iters=8 "
    "++init.max_length=1024"
)
"""The command of docs/starts.md."""


@pytest.mark.parametrize(
    ("overrides", "start", "field", "settings"),
    [
        (DOCUMENTED, "lora_one", "init_config", {"scale": "stable", "stable_gamma": 128.0}),
        ('+init=gradient ++init.weight="stable"', "lora_one", "init_config", {"scale": "stable"}),
        ("+init=gradient init.stable_gamma=auto", "lora_one", "init_config", {"stable_gamma": "auto"}),
        ("+init=gradient init.direction=ArBr", "lora_ga", "lora_ga_config", {"scale": "stable", "stable_gamma": 16}),
        ("+init=gradient init.direction=ArBr init.scale=gd", "lora_ga", "lora_ga_config", {"scale": "gd_scale"}),
        ("init=lora_ga init.direction=random", "lora_ga", "lora_ga_config", {"direction": "random"}),
        ("init=functional init.normalize=global", "functional", "init_config", {"normalize": "global"}),
        ("+init=svd init.exact=true", "pissa", "init_config", {"exact": True}),
        ("+init=kaiming", True, None, {}),
        ("+init=gaussian", "gaussian", None, {}),
        ("+init=eva init.rho=1.5 init.whiten=true", "eva", "eva_config", {"rho": 1.5, "whiten": True}),
        ("+init=corda init.corda_method=kpm", "corda", "corda_config", {"corda_method": "kpm"}),
        ("+init=olora init.pivoted=true", "olora", "init_config", {"pivoted": True}),
        ("+init=loftq init.loftq_bits=8 init.loftq_iter=3", "loftq", None, {}),
        ("init=gora init.step=0.1", "gora", "init_config", {"step": 0.1}),
        ("init=lora_sb init.eta=1e-4", "lora_sb", "init_config", {"eta": 1e-4}),
        *((f"init={name}", name, None, {}) for name in ("milora", "mica", "kasa", "lora_null")),
    ],
)
def test_starts_of_the_documents_become_configs(
    overrides: str, start: object, field: str | None, settings: dict[str, object]
) -> None:
    config = lora_config(compose(overrides.split()))
    assert config.init_lora_weights == start
    for name, value in settings.items():
        assert getattr(getattr(config, str(field)), name) == value
    if start == "loftq":
        assert config.loftq_config == {"loftq_bits": 8, "loftq_iter": 3}


def test_the_documented_command_sets_what_it_names_and_nothing_else() -> None:
    named = {"direction": "LoRA-FA", "scale": "stable", "stable_gamma": 128.0, "bsz": 1, "iters": 8, "max_length": 1024}
    default = plain(compose(["init=gradient"]))
    assert plain(compose(DOCUMENTED.split())) == default | {"init": default["init"] | named}
    assert DOCUMENTED in (ROOT / "docs" / "starts.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("overrides", "dropout"),
    [
        ("", 0.05),
        ("peft=dora init=lora_one", 0.05),
        ("init=pissa", 0.0),
        ("init=gradient init.direction=ArB2r", 0.0),
        ("init=pissa peft.lora_dropout=0.1", 0.1),
        ("peft.lora_dropout=0", 0.0),
    ],
)
def test_dropout_is_left_out_where_it_would_act_on_a_part_of_the_base(overrides: str, dropout: float) -> None:
    assert lora_config(compose(overrides.split())).lora_dropout == dropout


@pytest.mark.parametrize(
    "overrides",
    [
        "init=kaiming init.ranks=entropy init.bsz=2 init.iters=3 init.max_length=99 init.passes=4 init.r_min=1",
        "init=functional init.passes=2",
        "init=eva init.bsz=2 init.ranks=energy init.passes=2",
        "init=corda init.iters=3 init.max_length=99",
        "init=gradient init.scale=gd",
        "init=pissa init.bsz=1 init.iters=8 init.passes=1",
    ],
)
def test_settings_of_reading_are_taken_where_something_is_read(overrides: str) -> None:
    for override in overrides.split()[1:]:
        name, value = override.removeprefix("init.").split("=")
        assert str(getattr(compose(overrides.split()).init, name)) == value


def test_a_start_that_is_no_name_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"init\.mode is the name of a start, found None \(NoneType\)\. Pass 'default'"
    ):
        InitConfig(mode=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ("init=pissa init.rho=2", r"init\.rho does not belong to init\.mode=pissa, which has exact\. Drop it"),
        ("init=gaussian init.scale=unit", r"init\.scale does not belong to init\.mode=gaussian, which has no settings"),
        ("init=lora_one init.direction=ArBr", r"init\.direction does not belong to init\.mode=lora_one"),
        ("init=lora_ga init.stable_gamma=auto", r"stable_gamma must be a number > 0"),
        ("init=gradient init.iters=0", r"init\.iters must be an integer >= 1"),
        ("init=gradient init.ranks=budget init.r_min=4 init.r_max=2", r"r_max must be an integer >= 4"),
        ("init=gradient init.passes=3", r"passes must be 1 or an even number, found 3"),
        (
            "init=pissa init.ranks=cross_validation init.iters=1",
            r"compares two halves of the batches, and init\.iters is 1",
        ),
        ("init.passes=4", r"init\.passes=4 would change nothing: init\.mode=default reads no data\. Drop it"),
        ("init=pissa init.bsz=2", r"init\.bsz=2 would change nothing: init\.mode=pissa reads no data"),
        ("init=olora init.iters=9", r"init\.iters=9 would change nothing: init\.mode=olora reads no data"),
        ("init.max_length=99", r"init\.max_length=99 would change nothing: init\.mode=default reads no data"),
        *(
            (
                text,
                r"init\.passes=2 would change nothing: only a sketch of gradients takes more than one pass, and none",
            )
            for text in (
                "init=eva init.passes=2",
                "init=corda init.passes=2",
                "init=gora init.passes=2",
                "init=lora_one init.ranks=importance init.passes=2",
                "init=corda init.ranks=explained_variance init.passes=2",
            )
        ),
        ("init=gora init.r_min=2", r"init\.r_min=2 would change nothing: it bounds the ranks that init\.ranks chooses"),
        ("init=pissa init.ranks=explained_variance init.r_max=9", r"gives a layer 0 to .* and does not read r_max"),
        ("init.r_max=2", r"init\.r_max=2 would change nothing: .*, and init\.ranks is null\. Drop it"),
        ("init=gora init.ranks=budget init.share_ranks=true", r"init\.share_ranks=True .*: init\.ranks=budget chooses"),
        (
            "init=lora_one init.scale=gd init.stable_gamma=64",
            r"init\.stable_gamma=64\.0 .* and init\.scale is gd\. Drop",
        ),
    ],
)
def test_a_setting_of_another_start_is_refused(overrides: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        compose(overrides.split())
