"""Adapters with a matrix between B and A (LoRA-SB, KaSA): their files, their neighbours, and who refuses them."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from lorafa import (
    LoraConfig,
    PeftModel,
    collect_statistics,
    get_peft_model,
    get_peft_model_state_dict,
    initialize,
    replace_lora_weights_loftq,
    set_peft_model_state_dict,
)
from lorafa.costs.accounting import adapter_cost
from lorafa.errors import AdapterError, CalibrationError, CheckpointError, ConfigError
from lorafa.initializers.lora_sb import LoraSBConfig
from lorafa.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_lorapro_optimizer,
    create_preconditioned_adamw,
    create_riemannian_optimizer,
)
from toys.adapters import only_layer, read_by, stats_for, train, with_adapter
from toys.compare import close
from toys.layers import Single, base_layer

OUT, IN, R = 24, 16, 4
CORES = {"lora_sb": "lora_core", "kasa": "lora_diag"}
FOLDING = pytest.mark.parametrize("start", CORES)


def base(dtype: torch.dtype = torch.float32) -> Single:
    torch.manual_seed(1)
    return Single(nn.Linear(IN, OUT)).to(dtype).eval()


def config_of(start: bool | str, **settings: object) -> LoraConfig:
    values = {"r": R, "lora_alpha": 6, "target_modules": ["layer"], "init_seed": 0, "init_lora_weights": start}
    return LoraConfig(**(values | settings))  # type: ignore[arg-type]


def adapted(start: str, dtype: torch.dtype = torch.float32, *, keep: bool = True, **settings: object) -> PeftModel:
    model = base(dtype)
    stats = read_by(start, {"layer": stats_for(model.layer.weight)})
    put_on = get_peft_model(model, config_of(start, **settings), stats=stats, autocast_adapter_dtype=keep).eval()
    train(put_on)
    return put_on


@pytest.mark.parametrize("use_rslora", [False, True])
@FOLDING
def test_peft_reads_the_file_as_plain_lora_with_equal_outputs(start: str, use_rslora: bool, tmp_path: Path) -> None:
    """LoRA-SB at its rank; KaSA at twice its rank, with what was dropped from the base in the second half."""
    peft = pytest.importorskip("peft")
    model, x = adapted(start, use_rslora=use_rslora), torch.randn(7, IN)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == (R if start == "lora_sb" else 2 * R)
    assert written["init_lora_weights"] is True
    close(peft.PeftModel.from_pretrained(base(), tmp_path)(x), model(x), torch.float32)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.layer.lora_{factor}.weight"] for factor in "AB")
    scaling = written["lora_alpha"] / (written["r"] ** 0.5 if use_rslora else written["r"])
    close(scaling * B @ A, only_layer(model).get_delta_weight("default"), torch.float32)


@FOLDING
def test_the_first_half_of_a_file_holds_b_with_the_core_multiplied_in(start: str) -> None:
    model = adapted(start, torch.float64)
    tensors = get_peft_model_state_dict(model)
    A, B, core, unfolded = (
        tensors[f"base_model.model.layer.{key}"]
        for key in ("lora_A.weight", "lora_B.weight", CORES[start], "lora_unfolded.B")
    )
    layer = only_layer(model)
    assert torch.equal(unfolded, layer.factor_B("default"))
    assert torch.equal(A[:R], layer.factor_A("default"))
    close(B[:, :R], unfolded @ (core if start == "lora_sb" else torch.diag(core)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@FOLDING
def test_an_adapter_in_any_dtype_comes_back_bit_for_bit_and_trains_on(
    start: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, x = adapted(start, dtype, keep=False), torch.randn(7, IN).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(dtype), tmp_path, is_trainable=True, autocast_adapter_dtype=False)
    assert torch.equal(loaded(x), model(x))
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert trained[0] == trained[1]
    for m in (model, loaded):
        optimizer = AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1)
        m(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(loaded(x), model(x))


@FOLDING
def test_a_file_whose_b_is_not_its_core_times_the_rest_is_refused_whole(start: str, tmp_path: Path) -> None:
    model = adapted(start)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.layer.lora_B.weight"][:, 0] *= 1.5
    other = adapted(start, init_seed=9)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    text = (
        rf"layer\.lora_B\.weight is not layer\.lora_unfolded\.B times {CORES[start]}: one of them was changed since "
        r"adapter 'default' was saved\. To go on from layer\.lora_B\.weight as plain LoRA leave .*Nothing was loaded"
    )
    with pytest.raises(CheckpointError, match=text):
        set_peft_model_state_dict(other, tensors)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in before.items())
    plain = {key: value for key, value in tensors.items() if CORES[start] not in key and "unfolded" not in key}
    save_file(plain, path)
    loaded, x = PeftModel.from_pretrained(base(), tmp_path), torch.randn(3, IN)
    A, B = (plain[f"base_model.model.layer.lora_{factor}.weight"] for factor in "AB")
    close(loaded(x), base()(x) + 1.5 * x @ A.mT @ B.mT, torch.float32)


@FOLDING
def test_a_core_of_zero_is_saved_and_read(start: str, tmp_path: Path) -> None:
    model = adapted(start)
    nn.init.zeros_(getattr(only_layer(model), CORES[start])["default"].weight)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, IN)
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path)(x), model(x))


@FOLDING
def test_copies_are_equal_and_independent(start: str) -> None:
    model, x = adapted(start), torch.randn(5, IN)
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), expected)
        train(twin)
        assert not torch.equal(twin(x), expected)
    assert torch.equal(model(x), expected)


@FOLDING
def test_it_counts_beside_other_adapters_of_the_same_layer(start: str) -> None:
    """All see the same base: what KaSA drops is dropped by that adapter alone."""
    model, x = adapted(start, torch.float64), torch.randn(5, IN, dtype=torch.float64)
    own = model(x)
    model.add_adapter("plain", config_of(True))
    model.base_model.set_adapter("plain")
    train(model)
    plain = model(x)
    with torch.no_grad():
        of_base = base(torch.float64)(x)
    model.base_model.set_adapter(["default", "plain"])
    close(model(x) - of_base, (own - of_base) + (plain - of_base))
    model.delete_adapter("plain")
    model.set_adapter("default")
    assert torch.equal(model(x), own)


@FOLDING
def test_it_takes_no_bias_of_B(start: str) -> None:
    with pytest.raises(ConfigError, match=rf"lora_bias=True does not work with init_lora_weights='{start}'"):
        config_of(start, lora_bias=True)


@FOLDING
def test_dora_over_it_scales_the_rows_of_the_weight_with_the_dense_product(start: str) -> None:
    model = adapted(start, torch.float64, keep=False, use_dora=True)
    layer = only_layer(model)
    W, A, B = base(torch.float64).layer.weight, layer.factor_A("default"), layer.factor_B("default")
    between = getattr(layer, CORES[start])["default"].weight
    product = 1.5 * B @ (between if start == "lora_sb" else between.diag()) @ A
    if (taken := layer.adapters["default"].start) is not None:
        product = product - 1.5 * taken.B @ taken.A
    m = layer.lora_magnitude_vector["default"].weight
    changed = m[:, None] * (W + product) / (W + product).norm(dim=1, keepdim=True)
    x = torch.randn(5, IN, dtype=torch.float64)
    close(model(x), x @ changed.mT + base(torch.float64).layer.bias)


@FOLDING
def test_dora_over_it_starts_at_the_length_of_the_rows_it_computes_with(start: str) -> None:
    model = base(torch.float64)
    stats = read_by(start, {"layer": stats_for(model.layer.weight)})
    adapter = get_peft_model(model, config_of(start, use_dora=True), stats=stats, autocast_adapter_dtype=False)
    layer = only_layer(adapter)
    rows = layer.base_weight() + layer.adapters["default"].product()
    close(layer.lora_magnitude_vector["default"].weight, rows.norm(dim=1))
    x = torch.randn(5, IN, dtype=torch.float64)
    close(adapter(x), x @ rows.mT + layer.base_bias())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, OUT, bias=False), nn.Linear(IN, OUT, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) + self.second(x)
        return y


@FOLDING
def test_layers_that_share_a_weight_do_not_share_it(start: str) -> None:
    text = rf"ensure_weight_tying: 'first' and 'second' .* but {start} is no plain B A"
    with pytest.raises(ConfigError, match=text):
        get_peft_model(Tied(), config_of(start, target_modules=["first", "second"], ensure_weight_tying=True))


PAIRWISE: dict[str, Callable[[PeftModel], object]] = {
    "LoRA-FA": lambda model: create_lorafa_optimizer(model, lr=1e-2),
    "LoRA-FA, folded": lambda model: create_lorafa_optimizer(model, lr=1e-2, algorithm="fold"),
    "Riemannian": lambda model: create_riemannian_optimizer(model, SGD, lr=1e-2),
    "LoRA-One's AdamW": lambda model: create_preconditioned_adamw(model, lr=1e-2),
    "LoRA-Pro": lambda model: create_lorapro_optimizer(model, lr=1e-2),
}


@pytest.mark.parametrize("method", PAIRWISE)
@FOLDING
def test_optimizers_of_the_product_of_b_and_a_refuse_it(start: str, method: str) -> None:
    model = adapted(start)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    text = rf"layer, adapter 'default' is {start}, whose update is not .* Use a stock .* Nothing was changed"
    with pytest.raises(AdapterError, match=text):
        PAIRWISE[method](model)
    assert all(p.requires_grad == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


def test_lora_plus_gives_the_diagonal_of_kasa_the_rate_of_a() -> None:
    model = adapted("kasa")
    optimizer = create_loraplus_optimizer(model, SGD, lr=0.1, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    layer = only_layer(model)
    found = [rates[id(getattr(layer, kind)["default"].weight)] for kind in ("lora_A", "lora_B", "lora_diag")]
    assert found == pytest.approx([0.1, 1.6, 0.1])


def test_lora_plus_has_nothing_to_do_for_lora_sb() -> None:
    with pytest.raises(
        AdapterError, match=r"No factor of adapter 'default' is trained\..*neither \(LoRA-SB\) takes a "
    ):
        create_loraplus_optimizer(adapted("lora_sb"), SGD, lr=0.1, loraplus_lr_ratio=16)


@pytest.mark.parametrize("kind", ["lorafa.backends.int8.Int8Linear", "lorafa.backends.nf4.NF4Linear"])
@FOLDING
def test_loftqs_fit_after_the_fact_is_for_plain_lora(start: str, kind: str) -> None:
    put_on = with_adapter(Single(base_layer(kind)), kind, init_lora_weights=start)
    with pytest.raises(AdapterError, match=rf"no plain LoRA, .* it has {start}\."):
        replace_lora_weights_loftq(put_on, model_path="nowhere")


@FOLDING
def test_what_it_costs_is_told_without_its_numbers(start: str) -> None:
    cost = adapter_cost(base(), config_of(start))
    assert cost.trainable == (R * R if start == "lora_sb" else R * (IN + OUT) + R)


BATCHES = [torch.randn(6, IN, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum()  # type: ignore[no-any-return]


def test_initialize_adds_up_whole_gradients_for_lora_sb() -> None:
    """s B R A = [-eta sign(G)]_r of the sum of all batches' gradients, on a layer where a sketch would be smaller."""

    def wide() -> Single:
        torch.manual_seed(1)
        return Single(nn.Linear(100, 120)).double()

    batches = [torch.randn(6, 100, generator=torch.Generator().manual_seed(i)).double() for i in range(3)]
    model = wide()
    for batch in batches:
        loss(model, batch).backward()
    U, S, Vh = torch.linalg.svd(-0.1 * model.layer.weight.grad.sign())
    started = initialize(wide(), config_of("lora_sb", r=2, init_config=LoraSBConfig(eta=0.1)), batches, loss=loss)
    close(only_layer(started).get_delta_weight("default"), U[:, :2] * S[:2] @ Vh[:2])


def test_lora_sb_does_not_do_with_sketches() -> None:
    text = r"init_lora_weights='lora_sb' reads whole gradients, and dense=False keeps sketches .* Drop dense=False"
    with pytest.raises(CalibrationError, match=text):
        collect_statistics(base(), config_of("lora_sb"), BATCHES, loss=loss, dense=False)
