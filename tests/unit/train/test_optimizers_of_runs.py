"""Every optimizer from its settings to a trained adapter, and what its settings refuse."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from lorafa import optimizers
from lorafa.conf.compose import compose
from lorafa.errors import ConfigError
from lorafa.optimizers import OPTIMIZERS, LoraFAOptimizer, create_lorafa_optimizer
from lorafa.optimizers.pairs import pairs_of
from lorafa.settings.typed import build, plain
from lorafa.train.fit import training_arguments
from lorafa.train.settings.optim import OptimConfig, pair_optimizer, words
from lorafa.train.settings.run import RunConfig
from toys.training import adapted_model


def test_stock_optimizers_are_left_to_transformers() -> None:
    assert pair_optimizer(adapted_model(), OptimConfig(name="adamw")) is None


def test_settings_reach_the_optimizer() -> None:
    optim = compose(["optim=lora_fa", "optim.lr=3e-3", "optim.weight_decay=0.2"]).optim
    optimizer = pair_optimizer(adapted_model(), optim)
    assert isinstance(optimizer, LoraFAOptimizer)
    assert optimizer.param_groups[0]["lr"] == 3e-3
    assert optimizer.param_groups[0]["weight_decay"] == 0.2
    assert optimizer.param_groups[0]["eps"] == 1e-6


FOREIGN = {
    "optim=adamw optim.algorithm=fold": "optim=lora_fa",
    "optim=adamw optim.lr_ratio=2": "optim=lora_plus",
    "optim=lora_pro optim.reg=0.5": "optim=riemannian",
    "optim=lora_pro optim.damping=absolute": "optim=riemannian",
    "optim=riemannian optim.prec_reg=0.5": "optim=preconditioned",
    "optim=lora_fa optim.form=full": "optim=lora_pro",
    "optim=sgd optim.X=zero": "optim=lora_pro",
    "optim=riemannian optim.gram_damping=0.5": "optim=lora_pro",
    "optim=sgd optim.momentum=0.5": "optim=lora_pro",
    "optim=sgd optim.betas=[0.5,0.5]": "optim=adamw, optim=lora_fa, .*, optim=riemannian",
    "optim=adafactor optim.eps=1e-4": "optim=adamw, optim=lora_fa, .*, optim=riemannian",
}
"""Settings on the command line -> the optimizers that are said to have the last of them."""


def test_every_option_that_not_all_optimizers_have_is_tried() -> None:
    own = {
        field.name for name in OPTIMIZERS.names() if (kind := OPTIMIZERS.get(name).settings) for field in fields(kind)
    }
    assert {case.rpartition("optim.")[2].partition("=")[0] for case in FOREIGN} == own


@pytest.mark.parametrize("case", FOREIGN)
def test_an_option_of_another_optimizer_is_refused(case: str) -> None:
    chosen, option = case.split(" ")[0], case.rpartition(" ")[2].partition("=")[0]
    text = rf"'{option}' for {chosen} \(found .*\)\. It belongs to {FOREIGN[case]}\. {chosen} has: name, lr"
    with pytest.raises(ConfigError, match=text):
        compose(case.split())


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("optim=lora_pro optim.momentum=0.5", r"optim\.momentum belongs to form='sgd', and form='adamw' has betas"),
        (
            "optim=lora_pro optim.form=sgd optim.betas=[0.5,0.5]",
            r"betas and eps are Adam's, and form='sgd' has",
        ),
        ("optim=lora_pro optim.form=sgd optim.eps=1e-4", r"betas and eps are Adam's, and form='sgd' has"),
    ],
)
def test_an_option_of_another_form_is_refused(case: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        compose(case.split())


def test_an_unknown_option_is_looked_up_for_the_optimizer_that_is_chosen() -> None:
    text = r"'optim\.beta2' for optim=lora_fa \(found 0\.98\)\. Did you mean 'betas'\? optim=lora_fa has: .*algor"
    with pytest.raises(ConfigError, match=text):
        compose(["optim=lora_fa", "optim.beta2=0.98"])
    with pytest.raises(ConfigError, match=r"'optim\.betas' for optim=sgd .*optim=sgd has: [a-z_, ]*max_grad_norm\."):
        OptimConfig(name="sgd", own={"betas": (0.9, 0.98)})


def test_own_settings_of_another_class_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optim=lora_fa has settings of the class LoraFASettings, found 3 \(int\)"):
        OptimConfig(name="lora_fa", own=3)
    with pytest.raises(ConfigError, match=r"optim=sgd has no settings of its own, found 3 \(int\)"):
        OptimConfig(name="sgd", own=3)


def test_the_table_has_every_optimizer_of_the_settings() -> None:
    with pytest.raises(ConfigError, match=r"optim.name has no value 'adam'. Did you mean 'adamw'\?"):
        OptimConfig(name="adam")


def test_an_optimizer_without_options_is_the_same_in_a_script_and_on_the_command_line() -> None:
    assert OptimConfig() == compose([]).optim == compose(["optim=adamw"]).optim
    for name in OPTIMIZERS.names():
        assert OptimConfig(name=name) == compose([f"optim={name}"]).optim


RATES = {
    "adamw": 2e-3, "adafactor": 1e-3, "sgd": 1e-1, "lora_fa": 2e-3, "lora_plus": 2e-4, "riemannian": 1e-3,
    "preconditioned": 1e-3, "lora_pro": 1e-3,
}  # fmt: skip


def test_an_optimizer_starts_from_its_own_rate_which_the_settings_then_have() -> None:
    assert {name: compose([f"optim={name}"]).optim.lr for name in OPTIMIZERS.names()} == RATES
    assert compose(["optim=sgd", "optim.lr=null"]).optim.lr == 1e-1
    assert plain(compose(["optim=sgd"]))["optim"]["lr"] == 1e-1


CREATED = {
    "lora_fa": ("create_lorafa_optimizer", {}),
    "riemannian": ("create_riemannian_optimizer", {}),
    "preconditioned": ("create_preconditioned_adamw", {}),
    "lora_pro": ("create_lorapro_optimizer", {"gram_damping": "damping"}),
}
"""Optimizers -> the function that makes them, and what it calls some settings."""


@pytest.mark.parametrize("name", CREATED)
def test_a_default_of_the_settings_is_that_of_the_library(name: str) -> None:
    function, names = CREATED[name]
    parameters = inspect.signature(getattr(optimizers, function)).parameters
    kind = OPTIMIZERS.get(name).settings
    assert kind is not None
    compared = [field for field in fields(kind) if names.get(field.name, field.name) in parameters]
    assert compared
    for field in compared:
        assert field.default == parameters[names.get(field.name, field.name)].default, field.name


def test_the_form_is_a_part_of_the_name_where_it_is_not_the_default() -> None:
    assert words(OptimConfig()) == "adamw"
    assert words(OptimConfig(name="lora_fa", own={"algorithm": "exact"})) == "lora_fa"
    assert words(OptimConfig(name="lora_pro", own={"form": "full"})) == "lora_pro optim.form=full"


def test_transformers_is_told_of_an_optimizer_where_it_makes_it_and_only_there(tmp_path: Path) -> None:
    stock = training_arguments(compose(["optim.lr=3e-3", "optim.betas=[0.8,0.9]", "optim.weight_decay=0.1"]), tmp_path)
    assert (stock.optim, stock.learning_rate, stock.weight_decay) == ("adamw_torch", 3e-3, 0.1)
    assert (stock.adam_beta1, stock.adam_beta2) == (0.8, 0.9)
    assert training_arguments(compose(["optim=sgd"]), tmp_path).optim == "sgd"
    ours = training_arguments(compose(["optim=lora_fa", "optim.lr=3e-3", "optim.betas=[0.8,0.9]"]), tmp_path)
    untold = hf.TrainingArguments(str(tmp_path))
    for name in ("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"):
        assert getattr(ours, name) == getattr(untold, name), name


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999), 0.9, "ab", None])
def test_betas_are_two(betas: Any) -> None:
    with pytest.raises(ConfigError, match=r"optim.betas must be "):
        OptimConfig(own={"betas": betas})


@pytest.mark.parametrize("betas", [("0.9", 0.99), (0.9, None), (0.9, 1.0), (-0.1, 0.9), (True, 0.9)])
def test_betas_are_numbers_below_one(betas: Any) -> None:
    with pytest.raises(ConfigError, match=r"optim.betas must be "):
        OptimConfig(own={"betas": betas})


def test_eps_of_lora_fa_is_the_same_in_the_library_and_the_settings() -> None:
    library = inspect.signature(create_lorafa_optimizer).parameters["eps"].default
    assert OptimConfig(name="lora_fa").own.eps == compose(["optim=lora_fa"]).optim.own.eps == library == 1e-6
    assert OptimConfig().own.eps == 1e-8
    assert OptimConfig(name="lora_fa", own={"eps": 1e-8}).own.eps == 1e-8


def test_a_recorded_config_is_read_again_as_it_was() -> None:
    for name in ("adamw", "sgd", "adafactor", "lora_fa", "lora_pro"):
        config = compose([f"optim={name}"])
        assert build(RunConfig, plain(config)) == config


def test_damping_and_momentum_of_lora_pro_reach_it() -> None:
    settings = ["optim=lora_pro", "optim.form=sgd", "optim.momentum=0.9", "optim.gram_damping=0.5"]
    stepped = {}
    for count in (4, 3):
        model = adapted_model()
        optimizer = pair_optimizer(model, compose(settings[:count]).optim)
        assert optimizer is not None
        assert optimizer.param_groups[0]["momentum"] == 0.9
        for pair in pairs_of(model):
            pair.A.grad, pair.B.grad = torch.ones_like(pair.A), torch.ones_like(pair.B)
        optimizer.step()
        stepped[count] = pairs_of(model)[0].B.detach().clone()
    assert not torch.equal(stepped[4], stepped[3])


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [("momentum", 1.0, r"a number in \[0, 1\)"), ("gram_damping", -1.0, "a number >= 0"), ("eps", 0.0, "a number > 0")],
)
def test_numbers_out_of_range_are_refused(option: str, value: float, what: str) -> None:
    form: dict[str, Any] = {"form": "sgd"} if option == "momentum" else {}
    with pytest.raises(ConfigError, match=rf"optim.{option} must be {what}, found {value}"):
        OptimConfig(name="lora_pro", own=form | {option: value})


def test_best_checkpoints_are_measured_where_they_are_written() -> None:
    with pytest.raises(ConfigError, match=r"keep_best measures at every checkpoint .*=4.*eval_every=3"):
        compose(["train.keep_best=true", "train.checkpoint_every=4", "train.eval_every=3"])
