"""What a script hands to PEFT is taken and means the same: its config, arguments by position, modules to save."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorafa
from lorafa import choose_ranks, collect_statistics, initialize, start_from, with_ranks
from lorafa.errors import ConfigError
from toys.parity import quiet

# ---- PEFT's own config


def model(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


CONFIGS: dict[str, dict[str, Any]] = {
    "usual": {"target_modules": ["0", "2"], "r": 3, "lora_alpha": 5},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "target_modules": {"0", "2"}, "rank_pattern": {"0": 2}, "alpha_pattern": {"2": 1.5}, "use_rslora": True,
        "bias": "lora_only", "lora_bias": True, "task_type": "FEATURE_EXTRACTION",
    },
    "dora": {"target_modules": ["0"], "use_dora": True, "exclude_modules": ["2"], "revision": "v1"},
    "task": {"target_modules": ["0"], "task_type": peft.TaskType.CAUSAL_LM, "inference_mode": True},
    "pissa": {"target_modules": ["0"], "init_lora_weights": "pissa", "modules_to_save": ["2"]},
    "eva": {"target_modules": ["0"], "init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0, tau=0.9)},
    "lora_ga": {
        "target_modules": ["0"], "init_lora_weights": "lora_ga", "lora_ga_config": peft.LoraGAConfig(stable_gamma=8)
    },
    "a start that is not read": {"target_modules": ["0"], "eva_config": peft.EvaConfig()},
}  # fmt: skip


def pair(name: str) -> tuple[Any, lorafa.LoraConfig]:
    settings = CONFIGS[name]
    with quiet():
        theirs = peft.LoraConfig(**settings)
    ours = {key: getattr(value, "__dict__", value) for key, value in settings.items() if key != "task_type"}
    if name == "a start that is not read":
        del ours["eva_config"]
    task = settings.get("task_type")
    return theirs, lorafa.LoraConfig(**ours, task_type=getattr(task, "value", task))


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_config_is_read_field_by_field(name: str) -> None:
    from lorafa.surgery.given import lora_config

    theirs, ours = pair(name)
    before = theirs.to_dict()
    read = lora_config(theirs)
    assert type(read) is lorafa.LoraConfig
    mine = read.to_dict() | {"peft_version": None}
    assert mine == ours.to_dict() | {"peft_version": None}
    assert theirs.to_dict() == before


def test_pefts_runtime_config_is_read_too() -> None:
    asked = peft.LoraConfig(target_modules=["0"], runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    made = lorafa.get_peft_model(model(), asked)
    assert made.peft_config["default"].runtime_config.ephemeral_gpu_offload


DATA = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def loss(run: nn.Module, x: Tensor) -> Tensor:
    return run(x).square().mean()  # type: ignore[no-any-return]


def with_adapter(base: nn.Module) -> lorafa.PeftModel:
    return lorafa.get_peft_model(base, lorafa.LoraConfig(r=2, target_modules=["0"]), "first")


def saved(folder: Path) -> Path:
    with_adapter(model()).save_pretrained(folder, selected_adapters=["first"])
    return folder / "first"


STATS = collect_statistics(
    model(), lorafa.LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga"), DATA, loss=loss
)
TAKES = {
    "get_peft_model": lambda c, p: lorafa.get_peft_model(model(), c),
    "PeftModel": lambda c, p: lorafa.PeftModel(model(), c),
    "LoraModel": lambda c, p: lorafa.LoraModel(model(), c, "default"),
    "add_adapter": lambda c, p: with_adapter(model()).add_adapter("b", c),
    "base_model.put_on": lambda c, p: with_adapter(model()).base_model.put_on(c, "b"),
    "inject_adapter_in_model": lambda c, p: lorafa.inject_adapter_in_model(c, model()),
    "from_pretrained": lambda c, p: lorafa.PeftModel.from_pretrained(model(), saved(p), config=c),
    "with_ranks": lambda c, p: with_ranks(model(), c, {"0": 3}),
}
READS = {
    "initialize": lambda c, p: initialize(model(), c, DATA, loss=loss),
    "collect_statistics": lambda c, p: collect_statistics(model(), c, DATA, loss=loss),
    "start_from": lambda c, p: start_from(model(), c, STATS),
    "choose_ranks": lambda c, p: choose_ranks(model(), c, STATS),
    "estimate_gradients": lambda c, p: lorafa.estimate_gradients(
        base := model(), c, lambda: [loss(base, x).backward() for x in DATA]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", [*TAKES, *READS])
def test_every_function_that_takes_a_config_takes_pefts(name: str, tmp_path: Path) -> None:
    with quiet():
        settings = {"init_lora_weights": "lora_ga", "lora_ga_config": peft.LoraGAConfig()} if name in READS else {}
        asked = peft.LoraConfig(r=2, target_modules=["0"], **settings)  # type: ignore[arg-type]
        (TAKES | READS)[name](asked, tmp_path)


NO_CONFIGS: dict[str, tuple[Any, str]] = {
    "a dict": ({"r": 2}, r"found a dict\. Pass LoraConfig\(\*\*config\), or LoraConfig\.from_dict\(config\) for what"),
    "a file's dict": ({"r": 2, "peft_type": "LORA"}, r"found a dict\. Pass LoraConfig\.from_dict\(config\)\."),
    "a path": ("some/where", r"found 'some/where' \(str\)\. Pass .* or LoraConfig\.from_pretrained\('some/where'\)"),
    "a Path": (Path("x"), r"found .*Path.* or LoraConfig\.from_pretrained\('x'\) for the config that is saved there"),
    "IA3": (peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
            r"found a IA3Config of peft, whose peft_type is 'IA3'\. lorafa has LoRA and its variants only"),
    "AdaLora": (peft.AdaLoraConfig(target_modules=["0"], total_step=9), r"found a AdaLoraConfig of peft, whose"),
    "the class": (lorafa.LoraConfig, r"found the class LoraConfig\. Make one of it: LoraConfig\(\.\.\.\)\."),
    "a number": (8, r"found 8 \(int\)\. Pass LoraConfig\("),
    "a model": (nn.Linear(2, 2), r"found a Linear\. Pass LoraConfig\("),
    "a list": ([lorafa.LoraConfig()], r"found a list\. Pass LoraConfig\("),
}  # fmt: skip


@pytest.mark.matrix(4)
@pytest.mark.parametrize("name", [*TAKES, *READS])
@pytest.mark.parametrize("value", NO_CONFIGS)
def test_what_is_no_config_is_refused_with_its_type_and_what_to_write(value: str, name: str, tmp_path: Path) -> None:
    given, text = NO_CONFIGS[value]
    with quiet(), pytest.raises(ConfigError, match=rf"The config must be a LoraConfig, {text}"):
        (TAKES | READS)[name](given, tmp_path)


@pytest.mark.parametrize(
    "name", [n for n in (*TAKES, *READS) if n not in ("PeftModel", "LoraModel", "from_pretrained")]
)
def test_no_config_at_all_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The config must be a LoraConfig, found None \(NoneType\)"):
        (TAKES | READS)[name](None, tmp_path)


def test_a_config_that_is_refused_leaves_the_model_as_it_was() -> None:
    base = model()
    for call in (lorafa.get_peft_model, lorafa.PeftModel, lorafa.LoraModel):
        with pytest.raises(ConfigError):
            call(base, {"r": 2})  # type: ignore[arg-type]
    assert [type(m) for m in base] == [nn.Linear, nn.Tanh, nn.Linear]
    assert all(p.requires_grad for p in base.parameters())


def test_what_pefts_config_says_and_lorafa_does_not_know_is_refused() -> None:
    asked = peft.LoraConfig(target_modules=["0"])
    asked._register_custom_module({nn.Bilinear: nn.Linear})
    with pytest.raises(ConfigError, match="The LoraConfig of peft registers layers of its own, which lorafa does"):
        lorafa.get_peft_model(model(), asked)

    class Newer(peft.LoraConfig):
        def to_dict(self) -> dict[str, Any]:
            return super().to_dict() | {"use_more": 3}

    with pytest.raises(ConfigError, match=r"The Newer of test_parity_of_loading cannot be read: .*use_more=3"):
        lorafa.get_peft_model(model(), Newer(target_modules=["0"]))  # type: ignore[arg-type]


# ---- constructors and signatures


def test_constructors_put_an_adapter_on_as_in_peft() -> None:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["0"]}
    for make in (
        lambda lib: lib.PeftModel(model(), lib.LoraConfig(**settings)),
        lambda lib: lib.PeftModel(model(), lib.LoraConfig(**settings), "a"),
        lambda lib: lib.LoraModel(model(), lib.LoraConfig(**settings), "default"),
        lambda lib: lib.PeftModelForCausalLM(
            causal(), lib.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        ),
    ):
        ours, theirs = make(lorafa), make(peft)
        assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
            n: p.requires_grad for n, p in theirs.named_parameters()
        }
        assert list(ours.peft_config) == list(theirs.peft_config)
        assert ours.active_adapters == theirs.active_adapters


def causal() -> nn.Module:
    from toys.language_models import llama

    return llama()


SIGNATURES = [
    ("PeftModel.from_pretrained", lambda lib: lib.PeftModel.from_pretrained),
    ("PeftModel.load_adapter", lambda lib: lib.PeftModel.load_adapter),
    ("PeftModel.save_pretrained", lambda lib: lib.PeftModel.save_pretrained),
    ("PeftModel", lambda lib: lib.PeftModel.__init__),
    ("PeftModel.delete_adapter", lambda lib: lib.PeftModel.delete_adapter),
    ("LoraModel.merge_and_unload", lambda lib: lib.LoraModel.merge_and_unload),
    ("inject_adapter_in_model", lambda lib: lib.inject_adapter_in_model),
    ("load_peft_weights", lambda lib: lib.load_peft_weights),
    ("prepare_model_for_kbit_training", lambda lib: lib.prepare_model_for_kbit_training),
    ("get_base_model_state_dict", lambda lib: lib.get_base_model_state_dict),
    ("set_base_model_state_dict", lambda lib: lib.set_base_model_state_dict),
    ("AutoPeftModelForCausalLM", lambda lib: lib.AutoPeftModelForCausalLM.from_pretrained),
    ("get_peft_config", lambda lib: lib.get_peft_config),
]


@pytest.mark.parametrize(("name", "function"), SIGNATURES, ids=[name for name, _ in SIGNATURES])
def test_arguments_by_position_are_pefts(name: str, function: Any) -> None:
    def positional(lib: Any) -> list[str]:
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
        return [p.name for p in inspect.signature(function(lib)).parameters.values() if p.kind in kinds]

    ours, theirs = positional(lorafa), positional(peft)
    assert ours[: len(theirs)] == theirs
