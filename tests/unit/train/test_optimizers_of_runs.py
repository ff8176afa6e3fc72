"""Every optimizer from its settings to a trained adapter, and what its settings refuse."""

from __future__ import annotations

import inspect
from typing import Any, get_args, get_type_hints

import pytest
import torch

from lorafa.conf.compose import compose
from lorafa.conf.typed import build, plain
from lorafa.errors import ConfigError
from lorafa.optimizers import LoraFAOptimizer, create_lorafa_optimizer
from lorafa.optimizers.pairs import pairs_of
from lorafa.train.optimizers import FORMS, KINDS, NAMES, OPTIONS, pair_optimizer
from lorafa.train.schema import OptimConfig, RunConfig
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
    "optim=adamw optim.algorithm=fold": "optim=lora_fa, found optim=adamw",
    "optim=adamw optim.lr_ratio=2": "optim=lora_plus, found optim=adamw",
    "optim=lora_pro optim.reg=0.5": "optim=riemannian, found optim=lora_pro",
    "optim=lora_pro optim.damping=absolute": "optim=riemannian, found optim=lora_pro",
    "optim=riemannian optim.prec_reg=0.5": "optim=preconditioned, found optim=riemannian",
    "optim=lora_fa optim.form=full": "optim=lora_pro, found optim=lora_fa",
    "optim=sgd optim.X=zero": "optim=lora_pro, found optim=sgd",
    "optim=riemannian optim.gram_damping=0.5": "optim=lora_pro, found optim=riemannian",
    "optim=sgd optim.momentum=0.5": "optim=lora_pro optim.form=sgd, found optim=sgd",
    "optim=lora_pro optim.momentum=0.5": "optim=lora_pro optim.form=sgd, found optim=lora_pro",
    "optim=sgd optim.betas=[0.5,0.5]": "optim=adamw, lora_fa, .*, lora_pro, found optim=sgd",
    "optim=adafactor optim.betas=[0.5,0.5]": "optim=adamw, lora_fa, .*, lora_pro, found optim=adafactor",
    "optim=lora_pro optim.form=sgd optim.betas=[0.5,0.5]": "optim=adamw, .* found optim=lora_pro optim.form=sgd",
    "optim=sgd optim.eps=1e-4": "optim=adamw, lora_fa, .*, lora_pro, found optim=sgd",
    "optim=adafactor optim.eps=1e-4": "optim=adamw, lora_fa, .*, lora_pro, found optim=adafactor",
    "optim=lora_pro optim.form=sgd optim.eps=1e-4": "optim=adamw, .* found optim=lora_pro optim.form=sgd",
}
"""Settings on the command line -> what is said to have the last of them, and what was found."""


def test_every_option_that_not_all_optimizers_have_is_tried() -> None:
    assert {case.rpartition("optim.")[2].partition("=")[0] for case in FOREIGN} == set(OPTIONS)


@pytest.mark.parametrize("case", FOREIGN)
def test_an_option_of_another_optimizer_is_refused(case: str) -> None:
    option = case.rpartition(" ")[2].partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{option} belongs to {FOREIGN[case]}. Choose .*, or leave {option} out"):
        compose(case.split())


def test_the_table_has_every_optimizer_of_the_settings() -> None:
    assert set(NAMES) == set(get_args(get_type_hints(OptimConfig)["name"]))
    with pytest.raises(ConfigError, match=r"optim.name has no value 'adam'. Did you mean 'adamw'\?"):
        OptimConfig(name="adam")  # type: ignore[arg-type]


@pytest.mark.parametrize("key", [key for key, kind in KINDS.items() if kind.make is not None], ids=str)
def test_a_default_of_the_settings_is_that_of_the_library(key: tuple[str, ...]) -> None:
    name, *chosen = key
    form = {FORMS[name]: chosen[0]} if chosen else {}
    optim = OptimConfig(name=name, **form)  # type: ignore[arg-type]
    make = KINDS[key].make
    assert make is not None
    parameters = inspect.signature(make).parameters
    for ours, theirs in KINDS[key].reads.items():
        default = parameters[theirs].default if theirs in parameters else inspect.Parameter.empty
        if default is not inspect.Parameter.empty and ours not in form:
            assert getattr(optim, ours) == default, ours


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99, 0.999), 0.9, "ab", None])
def test_betas_are_two(betas: Any) -> None:
    with pytest.raises(ConfigError, match=r"optim.betas must be two numbers in \[0, 1\), found "):
        OptimConfig(betas=betas)


@pytest.mark.parametrize("betas", [("0.9", 0.99), (0.9, None), (0.9, 1.0), (-0.1, 0.9), (True, 0.9)])
def test_betas_are_numbers_below_one(betas: Any) -> None:
    with pytest.raises(ConfigError, match=r"optim.betas must be two numbers in \[0, 1\), found "):
        OptimConfig(betas=betas)


def test_eps_of_lora_fa_is_the_same_in_the_library_the_settings_and_the_yaml() -> None:
    library = inspect.signature(create_lorafa_optimizer).parameters["eps"].default
    assert OptimConfig(name="lora_fa").eps == compose(["optim=lora_fa"]).optim.eps == library == 1e-6
    assert OptimConfig().eps == 1e-8
    assert OptimConfig(name="lora_fa", eps=1e-8).eps == 1e-8


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
    form = {"form": "sgd"} if option == "momentum" else {}
    with pytest.raises(ConfigError, match=rf"optim.{option} must be {what}, found {value}"):
        OptimConfig(name="lora_pro", **form, **{option: value})  # type: ignore[arg-type]


def test_best_checkpoints_are_measured_where_they_are_written() -> None:
    with pytest.raises(ConfigError, match=r"keep_best measures at every checkpoint .*=4.*eval_every=3"):
        compose(["train.keep_best=true", "train.checkpoint_every=4", "train.eval_every=3"])
