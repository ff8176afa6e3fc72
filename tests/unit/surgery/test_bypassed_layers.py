"""Layers whose weight other code reads: an adapter there acts through the weight, or is refused."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, mutate_base
from lorafa.errors import BackendError, TargetError
from toys.adapters import train
from toys.compare import close

DIM = 8
ENCODER_TARGETS = (
    ["linear1"],
    ["linear2"],
    ["self_attn"],
    ["self_attn", "linear1", "linear2"],
    r"body\.layers\.0\.linear1",
)
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora_bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
    "pissa": {"init_lora_weights": "pissa"},
}


class Model(nn.Module):
    """Lets names be regular: its part is called ``body``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(*args, **kwargs)


def encoder(**settings: Any) -> Model:
    settings = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64} | settings
    return Model(nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, 2, 12, **settings), 2))


def inputs() -> tuple[Tensor, Tensor]:
    """Three sequences and the places of theirs that are padding."""
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = padding[2, 4:] = True
    return torch.randn(3, 5, DIM, dtype=torch.float64), padding


def adapted(model: nn.Module, targets: Any, **settings: Any) -> PeftModel:
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=targets, **settings))
    train(wrapped)
    return wrapped


def runs(model: PeftModel) -> Iterator[tuple[str, PeftModel]]:
    """The model in evaluation, with and without gradients and with its adapters frozen, which decide over kernels."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for gradients, frozen in itertools.product((True, False), (False, True)):
        for parameter in trained:
            parameter.requires_grad_(not frozen)
        with torch.set_grad_enabled(gradients):
            yield f"gradients {gradients}, frozen {frozen}", model.eval()
    for parameter in trained:
        parameter.requires_grad_(True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested", "ignore:.*lora_dropout does not act on attention")
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("targets", ENCODER_TARGETS, ids=str)
def test_transformer_encoder_computes_the_same_whatever_kernel_it_takes(
    targets: Any, settings: str, masked: bool
) -> None:
    """The merged model, in training mode, has no adapter and no kernel that could pass one by. Of padded sequences the
    encoder makes nested tensors."""
    model = adapted(encoder(), targets, **SETTINGS[settings])
    x, padding = inputs()
    given = {"src_key_padding_mask": padding} if masked else {}
    seen = ~padding if masked else torch.ones_like(padding)
    expected = copy.deepcopy(model).merge_and_unload().train()(x, **given)[seen]
    for how, running in runs(model):
        found = running(x, **given)[seen]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=how)
    model(x, **given)[seen].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_nested_tensors_that_reach_an_adapted_layer(settings: dict[str, Any]) -> None:
    """A hook turns the kernel off, but not the nested tensors the encoder has made of padded sequences by then."""
    model = adapted(encoder(), ["linear1", "linear2"], **settings)
    x, padding = inputs()
    expected = model.train()(x, src_key_padding_mask=padding)
    for layer in model.get_base_model().body.layers:
        layer.linear1.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        found = model.eval()(x, src_key_padding_mask=padding)
    close(found[~padding], expected[~padding])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_dropout_on_nested_tensors_is_refused() -> None:
    model = adapted(Model(nn.Linear(DIM, 3, dtype=torch.float64)), ["body"], lora_dropout=0.1)
    x = torch.nested.nested_tensor([torch.randn(n, DIM, dtype=torch.float64) for n in (2, 4)])
    with pytest.raises(BackendError, match=r"lora_dropout does not act on nested tensors.* Set lora_dropout=0, or"):
        model.train()(x)
    close(model.eval()(x).unbind()[1], model(x.unbind()[1]))


def test_encoder_with_its_adapters_off_takes_the_kernel_the_base_takes() -> None:
    base, (x, _) = encoder(), inputs()
    with torch.no_grad():
        expected = base.eval()(x)
        model = adapted(base, ["self_attn", "linear1", "linear2"]).eval()
        assert not torch.equal(model(x), expected)
        with model.disable_adapter():
            assert torch.equal(model(x), expected)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(x), expected)


def test_base_that_is_without_the_start_is_read_with_the_rest_of_the_adapter() -> None:
    model, (x, _) = adapted(encoder(), ["linear1", "linear2"], init_lora_weights="pissa"), inputs()
    expected = model.train()(x)
    mutate_base(model)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_decoder_and_both_together(training: bool) -> None:
    body = nn.Transformer(DIM, 2, 1, 1, 12, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = adapted(Model(body), r".*(attn|linear1|linear2)").train(training)
    (x, _), y = inputs(), torch.randn(3, 4, DIM, dtype=torch.float64)
    expected = copy.deepcopy(model).merge_and_unload().train()(x, y)
    for how, running in runs(model):
        torch.testing.assert_close(running.train(training)(x, y), expected, rtol=1e-9, atol=1e-9, msg=how)


# ---- a table of classes ---------------------------------------------------------------------------------------------


class WavLMAttention(nn.Module):
    """Multiplies by its projections' weights, as the class of that name in transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(DIM, DIM).double() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (nn.functional.linear(x, p.weight, p.bias) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return nn.functional.linear(y, self.out_proj.weight, self.out_proj.bias)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_layers_that_are_read_in_training_too_act_and_train(settings: dict[str, Any]) -> None:
    model = adapted(Model(WavLMAttention()), ["q_proj", "out_proj"], **settings)
    x, _ = inputs()
    close(model(x), copy.deepcopy(model).merge_and_unload()(x))
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    with model.disable_adapter():
        close(model(x), copy.deepcopy(model).unload()(x))


def test_dropout_that_cannot_act_on_them_is_said() -> None:
    with pytest.warns(UserWarning, match=r"lora_dropout=0.1 does not act where .* by a layer's weight.*q_proj"):
        adapted(Model(WavLMAttention()), ["q_proj"], lora_dropout=0.1)


class MambaMixer(nn.Module):
    """Its convolution has one filter a channel and is read, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(DIM, DIM)
        self.conv1d = nn.Conv1d(DIM, DIM, 2, groups=DIM, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.in_proj(x).transpose(1, 2)
        return nn.functional.conv1d(y, self.conv1d.weight, self.conv1d.bias, padding=1, groups=DIM)


@pytest.mark.parametrize("targets", [["conv1d"], r".*\.(in_proj|conv1d)"], ids=str)
def test_what_cannot_act_is_refused_before_anything_is_changed(targets: Any) -> None:
    model = Model(MambaMixer())
    with pytest.raises(TargetError, match=r"'body\.conv1d' is never called: a kernel takes.* Target the proj"):
        get_peft_model(model, LoraConfig(r=DIM, target_modules=targets))
    assert type(model.body.conv1d) is nn.Conv1d


def test_copy_of_a_layer_that_is_read_trains_and_is_read_itself() -> None:
    model = adapted(Model(MambaMixer()), ["in_proj"], modules_to_save=["conv1d"])
    x = torch.randn(2, 5, DIM)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---- tables that are there for others to share ----------------------------------------------------------------------


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.mix = nn.Embedding(11, DIM), nn.Linear(DIM, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        return self.mix(self.embed_tokens(ids))


class Halves(nn.Module):
    """An encoder and a decoder that call their own embeddings; ``table`` only holds the weight of both."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.encoder, self.decoder = nn.Embedding(11, DIM), Stack(), Stack()
        self.lm_head = nn.Linear(DIM, 11, bias=False)
        for module in (self.encoder.embed_tokens, self.decoder.embed_tokens, self.lm_head):
            module.weight = self.table.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.encoder(ids) + self.decoder(ids.flip(1)))


class CallsIt(Halves):
    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.encoder(ids) + self.decoder(ids.flip(1)) + self.table(ids))


class CallsItInside(Halves):
    def forward(self, ids: Tensor) -> Tensor:
        def first(x: Tensor) -> Tensor:
            return self.table(x)

        return self.lm_head(self.encoder(ids) + self.decoder(ids.flip(1)) + first(ids))


class CallsItByName(Halves):
    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.encoder(ids) + self.decoder(ids.flip(1)) + getattr(self, "table")(ids))  # noqa: B009


class GoesThroughChildren(Halves):
    def forward(self, ids: Tensor) -> Tensor:
        *embeddings, head = self.children()
        return head(sum(module(ids) for module in embeddings))


class OwnerCallsIt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Halves()

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(ids) + self.body.lm_head(self.body.table(ids))


CALLED = (CallsIt, CallsItInside, CallsItByName, GoesThroughChildren, OwnerCallsIt)
IDS = torch.arange(10).view(2, 5)
OTHERS = r"'encoder\.embed_tokens' and 'decoder\.embed_tokens' and 'lm_head'"


def test_table_that_nobody_calls_is_refused_with_those_that_are() -> None:
    model = Halves()
    config = LoraConfig(r=2, target_modules=["table", "mix"])
    with pytest.raises(TargetError, match=rf"'table' is never called: .*shares with {OTHERS}.* ensure_weight_tying="):
        get_peft_model(model, config)
    with pytest.raises(TargetError, match=rf"modules_to_save: 'table' is never called: .*{OTHERS}.* Name those"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["mix"], modules_to_save=["table"]))
    assert type(model.table) is nn.Embedding
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["table"], "ensure_weight_tying": True},
        {"target_modules": ["mix"], "modules_to_save": ["table"], "ensure_weight_tying": True},
        {"target_modules": ["mix"], "trainable_token_indices": [3, 4]},
        {"target_modules": ["mix"], "trainable_token_indices": {"table": [3, 4]}},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["mix"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=str,
)
def test_what_reaches_the_modules_that_are_called_trains(settings: dict[str, Any]) -> None:
    model = get_peft_model(Halves(), LoraConfig(r=2, **settings))
    train(model)
    model(IDS).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("made", CALLED)
def test_table_that_some_code_may_call_is_left_to_the_user(made: type[nn.Module]) -> None:
    model = get_peft_model(made(), LoraConfig(r=2, target_modules=["table"]))
    train(model)
    model(IDS).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_embedding_and_head_that_share_a_weight_are_both_called() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(11, DIM), "head": nn.Linear(DIM, 11, bias=False)})
    model["head"].weight = model["embed"].weight
    assert len(get_peft_model(model, LoraConfig(r=2, target_modules=["embed"])).base_model.lora_layers()) == 1


def test_file_with_such_a_target_loads_with_a_warning(tmp_path: Path) -> None:
    """PEFT writes them; their tensors did nothing there either."""
    apart = Halves()
    for module in (apart.encoder.embed_tokens, apart.decoder.embed_tokens):  # shares nothing, so it is not known
        module.weight = nn.Parameter(module.weight.detach().clone())
    apart.lm_head.weight = apart.encoder.embed_tokens.weight
    get_peft_model(apart, LoraConfig(r=2, target_modules=["table", "mix"])).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="'table' is never called"):
        model = PeftModel.from_pretrained(Halves(), str(tmp_path), ignore_base_mismatch=True)
    assert {name for name, _ in model.base_model.lora_layers()} == {"table", "encoder.mix", "decoder.mix"}
