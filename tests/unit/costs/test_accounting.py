"""What an adapter costs is what it then takes: parameters, file, gradients and optimizer state, counted beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.optimization import Adafactor

from lorafa import BdLoraConfig, LoraConfig, MontecloraConfig, VeloraConfig, get_peft_model
from lorafa.costs.accounting import AdapterCost, KindCost, adapter_cost
from lorafa.errors import AdapterError, ConfigError, TargetError
from lorafa.layers.base import LoraLayer
from lorafa.models.shapes import shape_model
from lorafa.optimizers import OPTIMIZERS as KNOWN
from lorafa.train.settings.optim import OptimConfig, pair_optimizer
from toys.training import adapted_model
from toys.watch import Allocated


class Experts(nn.Module):
    """Three experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,bi->bo", self.stack, x)


class Toy(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6, bias=False)])
        self.experts = Experts()
        self.conv = nn.Conv1d(4, 8, 3)
        self.head = nn.Linear(8, 10, bias=False)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.conv(self.experts(x)[..., None].expand(-1, -1, 3))[..., 0])


CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["0", "1"]},
    "everything": {
        "target_modules": ["embed", "0", "1", "conv"],
        "target_parameters": ["experts.stack"],
        "modules_to_save": ["head"],
    },
    "dora": {"target_modules": ["0", "conv"], "use_dora": True},
    "bias": {"target_modules": ["0"], "lora_bias": True, "bias": "all"},
    "ranks": {"target_modules": ["0", "1"], "rank_pattern": {"1": 5}},
    "a frozen": {"target_modules": ["0", "embed"], "freeze_A": True},
    "tokens": {"target_modules": ["1"], "trainable_token_indices": {"embed": [1, 3]}},
}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CONFIGS)
def test_counts_are_those_of_the_adapted_model_and_its_file(case: str, dtype: torch.dtype, tmp_path: Any) -> None:
    config = LoraConfig(r=2, **CONFIGS[case])
    cost = adapter_cost(Toy(dtype), config)
    model = get_peft_model(Toy(dtype), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert cost.trainable == sum(p.numel() for p in trained)
    assert cost.gradient_bytes == sum(p.numel() * p.element_size() for p in trained)
    assert (cost.base, cost.base_bytes) == (
        sum(p.numel() for p in Toy().parameters()),
        sum(p.numel() * p.element_size() for p in Toy(dtype).parameters()),
    )
    model.save_pretrained(str(tmp_path))
    assert cost.stored == sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())


def test_each_kind_of_layer_has_its_row() -> None:
    cost = adapter_cost(Toy(), LoraConfig(r=2, lora_bias=False, **CONFIGS["everything"]))
    assert cost.kinds == (
        KindCost("embed", "Embedding", 1, (2,), base=60, A=2 * 10, B=2 * 6, extras=0, trainable=32),
        KindCost("blocks", "Linear", 2, (2,), base=36 + 6 + 36, A=2 * 12, B=2 * 12, extras=0, trainable=48),
        KindCost("experts.stack", "Experts", 1, (2,), base=72, A=3 * 2 * 6, B=3 * 2 * 4, extras=0, trainable=60),
        KindCost("conv", "Conv1d", 1, (2,), base=8 * 12 + 8, A=2 * 12, B=2 * 8, extras=0, trainable=40),
    )
    assert cost.other == 80


def test_different_ranks_of_one_kind_are_all_named() -> None:
    assert adapter_cost(Toy(), LoraConfig(r=2, **CONFIGS["ranks"])).kinds[0].ranks == (2, 5)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_frozen_A_is_stored_and_not_trained(case: str) -> None:
    trained, frozen = (
        adapter_cost(Toy(), LoraConfig(r=2, **CONFIGS[case] | {"freeze_A": freeze_A})) for freeze_A in (False, True)
    )
    assert (trained.factors, frozen.factors) == ("AB", "B")
    assert frozen.stored == trained.stored
    assert trained.trainable - frozen.trainable == sum(kind.A for kind in trained.kinds)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("start", ["pissa", "olora", "milora", "svd_of_weight", "kasa", "mica"])
def test_what_a_start_takes_out_of_the_base_is_counted_as_the_file_then_holds_it(
    start: str, dora: bool, tmp_path: Path
) -> None:
    """A start that moves the base is written as plain LoRA of rank 2r, or in keys of its own beside DoRA."""
    config = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=start, lora_dropout=0.0, use_dora=dora)
    counted = adapter_cost(Toy(), config).stored
    get_peft_model(Toy(), config).save_pretrained(str(tmp_path))
    assert counted == sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())


def test_experts_and_their_router_are_counted_at_ranks_that_go_with_their_number(tmp_path: Path) -> None:
    """The rank that GOAT's experts share is a multiple of their number, also where what an optimizer says is tried."""
    config = LoraConfig(
        r=6, target_modules=["0"], init_lora_weights="goat", init_config={"experts": 3}, lora_dropout=0.0
    )
    model = nn.Sequential(nn.Linear(9, 7))
    counted = adapter_cost(model, config)
    assert (counted.kinds[0].A, counted.kinds[0].B, counted.kinds[0].extras) == (6 * 9, 6 * 7, 3 * 9)
    get_peft_model(model, config).save_pretrained(str(tmp_path))
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert counted.stored == sum(tensor.numel() for tensor in written.values())
    with pytest.raises(AdapterError, match=r"0, adapter 'default' is goat, in which each token has parts of A and B"):
        adapter_cost(nn.Sequential(nn.Linear(9, 7)), config, OptimConfig(name="lora_fa"))


def test_extras_are_what_is_beside_A_and_B() -> None:
    plain, dora, bias = (
        adapter_cost(Toy(), LoraConfig(r=2, target_modules=["0"], **more)).kinds[0]
        for more in ({}, {"use_dora": True}, {"lora_bias": True})
    )
    assert (plain.extras, dora.extras, bias.extras) == (0, 6, 6)
    assert dora.trainable - plain.trainable == 6


@pytest.mark.parametrize("case", CONFIGS)
def test_the_model_is_left_as_it_was(case: str) -> None:
    model = Toy().requires_grad_(True)
    model.head.weight.requires_grad_(False)

    def state() -> list[tuple[Any, ...]]:
        modules = [(name, id(module), module.training) for name, module in model.named_modules()]
        return [*modules, *((n, id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters())]

    before = state()
    adapter_cost(model, LoraConfig(r=2, **CONFIGS[case]))
    after = state()
    assert [row[:3] for row in before] == [row[:3] for row in after]
    assert all(torch.equal(a[3], b[3]) for a, b in zip(before, after, strict=True) if len(a) == 4)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adafactor": {},
    "sgd": {},
    "lora_fa": {},
    "lora_plus": {},
    "riemannian": {},
    "preconditioned": {},
    "lora_pro": {},
    "lora_pro sgd": {"form": "sgd"},
    "lora_pro momentum": {"form": "sgd", "momentum": 0.9},
    "lora_pro full": {"form": "full"},
    "lora_fa fold": {"algorithm": "fold"},
}


def test_every_optimizer_of_the_settings_is_tried() -> None:
    assert {case.partition(" ")[0] for case in OPTIMIZERS} == set(KNOWN.names())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_the_state_is_what_the_optimizer_then_holds(case: str, dtype: torch.dtype) -> None:
    settings = {"r": 2, "target_modules": ["0", "1", "conv"], "modules_to_save": ["head"]}
    optim = OptimConfig(name=case.partition(" ")[0], own=OPTIMIZERS[case])
    cost = adapter_cost(Toy(dtype), LoraConfig(**settings), optim)  # type: ignore[arg-type]
    model = get_peft_model(Toy(dtype), LoraConfig(**settings))  # type: ignore[arg-type]
    optimizer = pair_optimizer(model, optim) or _stock(optim.name, model)
    assert cost.state_bytes == held_after_a_step(optimizer, model)


def held_after_a_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> int:
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


@pytest.mark.parametrize("form", ["adamw", "sgd", "full"])
def test_factors_that_are_tied_count_once(form: str) -> None:
    def tied() -> nn.Module:
        model = Toy()
        model.head = nn.Linear(6, 10, bias=False)
        model.head.weight = model.embed.weight
        return model

    config = LoraConfig(r=2, target_modules=["0", "embed", "head"], ensure_weight_tying=True)
    optim = OptimConfig(name="lora_pro", own={"form": form})
    cost = adapter_cost(tied(), config, optim)
    model = get_peft_model(tied(), config)
    assert cost.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert cost.state_bytes == held_after_a_step(pair_optimizer(model, optim), model)  # type: ignore[arg-type]


def test_a_start_that_trains_one_factor_counts_one() -> None:
    config = LoraConfig(r=2, target_modules=["0", "conv"], init_lora_weights="mica")
    cost = adapter_cost(Toy(), config)
    model = get_peft_model(Toy(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert cost.factors == "A"
    assert cost.trainable == sum(kind.A for kind in cost.kinds) == sum(p.numel() for p in trained)
    assert cost.gradient_bytes == 4 * cost.trainable
    assert cost.state_bytes == held_after_a_step(torch.optim.AdamW(trained), model)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mica": ({"init_lora_weights": "mica"}, {"name": "lora_fa"}),
    "mica fold": ({"init_lora_weights": "mica"}, {"name": "lora_fa", "own": {"algorithm": "fold"}}),
    "mica riemannian": ({"init_lora_weights": "mica"}, {"name": "riemannian"}),
    "riemannian": ({"freeze_A": True}, {"name": "riemannian"}),
    "preconditioned": ({"freeze_A": True}, {"name": "preconditioned"}),
    "lora_pro": ({"freeze_A": True}, {"name": "lora_pro"}),
    "lora_pro full": ({"freeze_A": True}, {"name": "lora_pro", "own": {"form": "full"}}),
    "dependent rows": ({"init_lora_weights": "orthogonal"}, {"name": "lora_fa"}),
    "a formula of other factors": ({"use_qalora": True, "qalora_group_size": 2}, {"name": "lora_pro"}),
    "an embedding's A is zero": ({"target_modules": ["0", "embed"]}, {"name": "lora_fa"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_training_refuses_is_refused_in_the_same_words(case: str) -> None:
    settings, optim = {"r": 2, "target_modules": ["0", "1"]} | REFUSED[case][0], OptimConfig(**REFUSED[case][1])
    with pytest.raises(AdapterError) as in_training:
        pair_optimizer(get_peft_model(Toy(), LoraConfig(**settings)), optim)
    model = Toy()
    with pytest.raises(AdapterError) as before:
        adapter_cost(model, LoraConfig(**settings), optim)
    assert str(before.value) == str(in_training.value)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


FORMULAS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "alora over dora": {"use_dora": True, "alora_invocation_tokens": [1]},
    "velora": {"velora_config": VeloraConfig(num_groups=2)},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "dora over monteclora": {"use_dora": True, "monteclora_config": MontecloraConfig()},
    "bdlora": {"use_bdlora": BdLoraConfig(target_modules_bd_a=["0", "1"], nblocks=2)},
}


@pytest.mark.parametrize("name", ["adamw", "lora_fa", "lora_plus", "lora_pro", "preconditioned", "riemannian"])
@pytest.mark.parametrize("case", FORMULAS)
def test_a_formula_with_tensors_of_its_own_goes_with_an_optimizer_as_in_training(case: str, name: str) -> None:
    config = LoraConfig(r=2, target_modules=["0", "1"], **FORMULAS[case])

    def refusal(of: Callable[[], Any]) -> str | None:
        try:
            of()
        except AdapterError as error:
            return str(error)
        return None

    optim = OptimConfig(name=name)
    in_training = refusal(lambda: pair_optimizer(get_peft_model(Toy(), config), optim))
    assert refusal(lambda: adapter_cost(Toy(), config, optim)) == in_training


def test_counting_leaves_the_random_state_alone() -> None:
    model, before = Toy(), torch.get_rng_state()
    adapter_cost(model, LoraConfig(r=2, target_modules=["0"]), OptimConfig(name="lora_plus"))
    assert torch.equal(torch.get_rng_state(), before)


def _stock(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """As transformers makes them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "adafactor":
        return Adafactor(trained, lr=1e-3, scale_parameter=False, relative_step=False)
    return torch.optim.SGD(trained, lr=1e-3) if name == "sgd" else torch.optim.AdamW(trained, lr=1e-3)


def test_lora_fas_optimizer_freezes_A() -> None:
    frozen = adapter_cost(Toy(), LoraConfig(r=2, target_modules=["0"], freeze_A=True))
    assert adapter_cost(Toy(), LoraConfig(r=2, target_modules=["0"]), OptimConfig(name="lora_fa")) == frozen


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("smollm2-135m", 134_515_008), ("llama-3-8b", 8_030_261_248), ("llama-3-70b", 70_553_706_496)],
)
def test_known_shapes_have_their_published_size(name: str, parameters: int) -> None:
    assert sum(p.numel() for p in shape_model(name).parameters()) == parameters


def llama_cost(rank: int, hidden: int, kv: int, mlp: int, layers: int) -> int:
    """A and B on all seven projections of a Llama, by hand."""
    sides = (2 * hidden, hidden + kv, hidden + kv, 2 * hidden, *3 * (hidden + mlp,))
    return layers * rank * sum(sides)


def test_what_allocates_is_seen() -> None:
    with Allocated() as seen:
        adapter_cost(nn.Sequential(nn.Linear(8, 6)), LoraConfig(r=2, target_modules=["0"]))
    assert seen.nbytes >= 4 * 8 * 6


def test_a_70b_is_counted_in_seconds_without_memory() -> None:
    adapter_cost(shape_model("opt-125m"), LoraConfig(r=2, target_modules=["q_proj"]))  # what is imported once
    started = time.monotonic()
    with Allocated() as seen:
        model = shape_model("llama-3-70b")
        cost = adapter_cost(model, LoraConfig(r=16, target_modules="all-linear"))
    assert time.monotonic() - started < 60  # takes a few
    assert seen.nbytes < 2**20  # the weights are of 134,000 MiB, one factor of the smallest layer of half a one
    assert cost.trainable == llama_cost(16, 8192, 1024, 28672, 80)
    assert cost.base_bytes == 2 * 70_553_706_496
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_start_from_the_weights_counts_like_any_other_but_for_its_file() -> None:
    config = {"r": 2, "target_modules": ["q_proj"]}
    pissa = adapter_cost(shape_model("opt-125m"), LoraConfig(init_lora_weights="pissa", **config))  # type: ignore[arg-type]
    plain = adapter_cost(shape_model("opt-125m"), LoraConfig(**config))  # type: ignore[arg-type]
    assert replace(pissa, stored=plain.stored) == plain
    assert pissa.stored == 2 * plain.stored  # a file of rank 2r


def test_an_adapted_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"The model carries adapters already, .* Give the base model\."):
        adapter_cost(adapted_model(), LoraConfig(target_modules=["q_proj"]))


def test_a_failure_leaves_the_model_alone() -> None:
    model = Toy()
    with pytest.raises(TargetError, match="'nope' matches nothing"):
        adapter_cost(model, LoraConfig(r=2, target_modules=["0", "nope"]))
    assert all(p.requires_grad for p in model.parameters())
    assert isinstance(adapter_cost(model, LoraConfig(r=2, target_modules=["0"])), AdapterCost)
