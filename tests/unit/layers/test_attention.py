"""Adapters on nn.MultiheadAttention: both projections, every way it is called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import BackendError, ConfigError, TargetError
from toys.adapters import train
from toys.compare import close

DIM, HEADS = 8, 2


class Attends(nn.Module):
    def __init__(self, **settings: object) -> None:
        super().__init__()
        settings = {"dtype": torch.float64, "batch_first": True} | settings
        self.attention = nn.MultiheadAttention(DIM, HEADS, **settings)  # type: ignore[arg-type]

    def forward(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = self.attention(*args, **kwargs)
        return result


def adapted(config: dict[str, object] | None = None, **settings: object) -> PeftModel:
    lora = LoraConfig(target_modules=["attention"], r=2, lora_alpha=3, **(config or {}))  # type: ignore[arg-type]
    model = get_peft_model(Attends(**settings), lora)
    train(model)
    return model


def updated(model: PeftModel, out_factor: float = 1.0) -> nn.MultiheadAttention:
    """A plain module with the updates written into its weights, by the formula."""
    host = model.get_base_model().attention
    base, inner = host.base_layer, host.base_layer.out_proj
    twin = nn.MultiheadAttention(
        DIM, HEADS, dtype=torch.float64, batch_first=base.batch_first, bias=base.in_proj_bias is not None
    )
    with torch.no_grad():
        A, B = host.lora_A["default"].weight, host.lora_B["default"].weight
        twin.in_proj_weight.copy_(base.in_proj_weight + 1.5 * B @ A)
        A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
        twin.out_proj.weight.copy_(inner.base_layer.weight + out_factor * 1.5 * B @ A)
        if base.in_proj_bias is not None:
            twin.in_proj_bias.copy_(base.in_proj_bias)
            twin.out_proj.bias.copy_(inner.base_layer.bias)
    return twin.train(model.training)


def sequence(length: int = 5, batch: int = 3) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_outputs_and_attention_are_those_of_the_updated_weights(
    need_weights: bool, batch_first: bool, bias: bool, gradients: bool, training: bool
) -> None:
    """Evaluation without gradients takes PyTorch's fused kernel."""
    model = adapted(batch_first=batch_first, bias=bias).train(training)
    x, twin = sequence(), updated(model)
    with torch.set_grad_enabled(gradients):
        y, attention = model(x, x, x, need_weights=need_weights)
        wanted, wanted_attention = twin(x, x, x, need_weights=need_weights)
    close(y, wanted)
    if need_weights:
        close(attention, wanted_attention)
    else:
        assert attention is None


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_cross_attention_with_masks(training: bool) -> None:
    model = adapted().train(training)
    query, memory, twin = sequence(4), sequence(6), updated(model)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, 4:] = True
    mask = torch.triu(torch.ones(4, 6, dtype=torch.bool), 3)
    arguments = (query, memory, memory, padding, True, mask, False)  # weights of every head
    for found, wanted in zip(model(*arguments), twin(*arguments), strict=True):
        close(found, wanted)


def test_input_without_a_batch_dimension() -> None:
    model = adapted()
    x, twin = sequence()[0], updated(model)
    close(model(x, x, x)[0], twin(x, x, x)[0])


def test_gradients_are_those_of_the_updated_weights() -> None:
    model = adapted()
    x, twin = sequence(), updated(model)
    probe = torch.randn_like(x)
    (model(x, x, x)[0] * probe).sum().backward()
    (twin(x, x, x)[0] * probe).sum().backward()
    host = model.get_base_model().attention
    for layer, gradient in ((host, twin.in_proj_weight.grad), (host.base_layer.out_proj, twin.out_proj.weight.grad)):
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        close(A.grad, 1.5 * B.T @ gradient)
        close(B.grad, 1.5 * gradient @ A.T)
    assert host.base_layer.in_proj_weight.grad is None


def test_output_projection_is_adapted_once_and_twice_only_on_request() -> None:
    """PEFT applies it twice (unmerged): attention_out_proj_twice=True gives its outputs."""
    x = sequence()
    model = adapted()
    close(model(x, x, x)[0], updated(model)(x, x, x)[0])
    model = adapted({"attention_out_proj_twice": True})
    close(model(x, x, x)[0], updated(model, out_factor=2)(x, x, x)[0])


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_bias_of_the_output_projection_is_added_once_also_where_its_product_is_twice(scale: float) -> None:
    """As in PEFT, whose forward attention_out_proj_twice=True gives."""
    x = sequence()
    model = adapted({"attention_out_proj_twice": True, "lora_bias": True}).eval()
    host = model.get_base_model().attention
    inner, twin = host.base_layer.out_proj, updated(model, out_factor=2 * scale)
    inner.set_scale("default", scale)
    with torch.no_grad():
        twin.in_proj_bias.add_(1.5 * host.lora_B["default"].bias)
        twin.out_proj.bias.add_(scale * 1.5 * inner.lora_B["default"].bias)
        close(model(x, x, x)[0], twin(x, x, x)[0])
        close(model.merge_and_unload()(x, x, x)[0], twin(x, x, x)[0])


@pytest.mark.parametrize("start", [True, "pissa"])
def test_merge_unload_and_disable(start: bool | str) -> None:
    x = sequence()
    model = adapted({"init_lora_weights": start}).eval()
    with torch.no_grad():
        expected = model(x, x, x)[0]
        with model.disable_adapter():
            base = model(x, x, x)[0]
        model.merge_adapter()
        close(model(x, x, x)[0], expected)
        with model.disable_adapter():
            assert torch.equal(model(x, x, x)[0], base)
        model.unmerge_adapter()
        assert torch.equal(model(x, x, x)[0], expected)
        plain = model.unload()
        assert type(plain.attention) is nn.MultiheadAttention
        assert torch.equal(plain(x, x, x)[0], base)


def test_output_projection_that_is_adapted_twice_stays_so_when_its_scale_is_set() -> None:
    inner = adapted({"attention_out_proj_twice": True}).get_base_model().attention.base_layer.out_proj
    assert inner.scaling == {"default": 3.0}
    inner.set_scale("default", 0.5)
    assert inner.scaling == {"default": 1.5}
    inner.unscale_layer()
    assert inner.scaling == {"default": 3.0}


def test_lora_bias_moves_both_biases() -> None:
    x, model = sequence(), adapted({"lora_bias": True})
    host = model.get_base_model().attention
    twin = updated(model)
    with torch.no_grad():
        twin.in_proj_bias.add_(1.5 * host.lora_B["default"].bias)
        twin.out_proj.bias.add_(1.5 * host.base_layer.out_proj.lora_B["default"].bias)
    close(model(x, x, x)[0], twin(x, x, x)[0])
    close(model.merge_and_unload()(x, x, x)[0], twin(x, x, x)[0])


def test_lora_bias_where_there_is_no_bias_to_add_it_to_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"attention: lora_bias has nothing to act on in .*bias=False.* Exclude it"):
        adapted({"lora_bias": True}, bias=False)


def test_two_adapters_add_up() -> None:
    x, model = sequence(), adapted()
    model.add_adapter("b", LoraConfig(target_modules=["attention"], r=2, init_lora_weights=False))
    model.base_model.set_adapter(["default", "b"])
    expected = model.eval()(x, x, x)[0]
    model.merge_adapter()
    close(model(x, x, x)[0], expected)
    model.unmerge_adapter()
    model.set_adapter("default")
    close(model(x, x, x)[0], updated(model)(x, x, x)[0])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inside_a_transformer_encoder_whose_fused_kernel_would_pass_it_by(training: bool, norm_first: bool) -> None:
    """In evaluation nn.TransformerEncoderLayer reads the attention's weights itself, unless told that it cannot."""
    layer = nn.TransformerEncoderLayer(
        DIM, HEADS, 16, dropout=0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model = get_peft_model(encoder, LoraConfig(target_modules=["self_attn", "linear1"], r=2))
    train(model)
    x = sequence()
    expected = model.train()(x)
    model.train(training)
    with torch.no_grad():
        close(model(x), expected)
        padding = torch.zeros(3, 5, dtype=torch.bool)
        padding[0, 3:] = True
        masked = model(x, src_key_padding_mask=padding)
        close(model.merge_and_unload()(x), expected)
    close(masked[1:], expected[1:])


def test_reads_as_the_attention_it_wraps() -> None:
    host = adapted().get_base_model().attention
    base = host.base_layer
    for name in ("embed_dim", "num_heads", "head_dim", "dropout", "batch_first", "out_proj"):
        assert getattr(host, name) is getattr(base, name), name
    with pytest.raises(AttributeError, match="'LoraAttention' object has no attribute 'nonsense'"):
        _ = host.nonsense


def test_weights_that_others_read_hold_the_updates_of_the_adapters_that_count() -> None:
    model, x = adapted({"lora_bias": True}).eval(), sequence()
    host = model.get_base_model().attention

    def by_hand() -> Tensor:
        """The attention as code that multiplies by the weights itself computes it."""
        y, _ = nn.functional.multi_head_attention_forward(
            *(x.transpose(0, 1),) * 3, DIM, HEADS, host.in_proj_weight, host.in_proj_bias, None, None, False, 0.0,
            host.out_proj.weight, host.out_proj.bias, training=False,
        )  # fmt: skip
        return y.transpose(0, 1)

    close(by_hand(), model(x, x, x)[0])
    by_hand().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        assert host.in_proj_weight is host.base_layer.in_proj_weight
        close(by_hand(), model(x, x, x)[0])


def test_separate_projections_are_refused() -> None:
    with pytest.raises(TargetError, match=r"kdim or vdim .* three separate projections.* exclude_modules"):
        adapted(kdim=4, vdim=4)


def test_output_projection_alone_is_refused() -> None:
    with pytest.raises(TargetError, match=r"'attention.out_proj' is never called.*Target 'attention' instead"):
        get_peft_model(Attends(), LoraConfig(target_modules=["out_proj"]))


def test_dropout_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="attention: lora_dropout does not act on attention layers"):
        adapted({"lora_dropout": 0.1})


def test_asking_for_a_product_with_the_input_says_that_the_update_is_in_the_weight() -> None:
    model = get_peft_model(nn.Sequential(nn.MultiheadAttention(8, 2)), LoraConfig(target_modules=["0"], r=2))
    layer = model.base_model.model[0]
    with pytest.raises(BackendError, match=r"LoraAttention adds its update to the weight .* exclude the layer"):
        layer.low_rank(torch.ones(1, 8), torch.ones(2, 8), torch.ones(24, 2), 1.0)
