"""Adapters on embeddings: A holds a column for each token, B is shared by all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, get_peft_model, get_peft_model_state_dict
from lorafa.errors import TargetError
from toys.adapters import on_layer, only_layer
from toys.compare import close
from toys.layers import Single


def test_output_is_the_row_of_the_updated_table() -> None:
    model, x = on_layer(nn.Embedding(10, 6, dtype=torch.float64)), torch.tensor([[0, 3, 3], [9, 1, 0]])
    layer = only_layer(model)
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    table = layer.get_base_layer().weight + 1.5 * (B @ A).T
    close(model(x), table[x])


def test_scalar_and_empty_indices() -> None:
    model = on_layer(nn.Embedding(10, 6))
    assert model(torch.tensor(3)).shape == (6,)
    assert model(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 6)


def test_gradients_are_those_of_the_updated_table() -> None:
    model, x = on_layer(nn.Embedding(10, 6, dtype=torch.float64)), torch.tensor([0, 3, 3, 9])
    layer = only_layer(model)
    probe = torch.randn(4, 6, dtype=torch.float64)
    (model(x) * probe).sum().backward()
    A, B = (t["default"].detach().clone().requires_grad_() for t in (layer.lora_embedding_A, layer.lora_embedding_B))
    ((layer.get_base_layer().weight + 1.5 * (B @ A).T)[x] * probe).sum().backward()
    close(layer.lora_embedding_A["default"].grad, A.grad)
    close(layer.lora_embedding_B["default"].grad, B.grad)


def test_padding_row_gets_no_gradient_from_the_adapter() -> None:
    """nn.Embedding promises that the row of padding_idx is not trained."""
    model, x = on_layer(nn.Embedding(10, 6, padding_idx=2)), torch.tensor([2, 2, 5])
    layer = only_layer(model)
    model(x).sum().backward()
    assert not layer.lora_embedding_A["default"].grad[:, 2].any()
    assert layer.lora_embedding_A["default"].grad[:, 5].any()


def test_padding_row_computes_the_same_before_and_after_merging() -> None:
    model, x = on_layer(nn.Embedding(10, 6, padding_idx=2)), torch.tensor([2, 5])
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)


class Scaled(nn.Embedding):
    """As in Gemma of transformers: the table is multiplied on the way out."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.embed_scale = 6**0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"},
                                      {"use_dora": True, "init_lora_weights": "pissa"}], ids=str)  # fmt: skip
def test_scale_inside_the_embedding_acts_on_the_update_too(settings: dict[str, object]) -> None:
    model, x = on_layer(Scaled(10, 6, dtype=torch.float64), **settings), torch.tensor([[0, 3], [9, 1]])
    layer = only_layer(model)
    weight = layer.get_base_layer().weight
    table = weight + layer.adapters["default"].delta_weight(weight.T).T
    close(model(x), table[x] * 6**0.5)
    expected = model(x)
    close(model.merge_and_unload()(x), expected)


def test_embedding_that_looks_up_other_rows_than_its_input_is_refused() -> None:
    """As OPT's positions, which are counted from an attention mask: the input is no index."""

    class Positions(nn.Embedding):
        def forward(self, mask: Tensor) -> Tensor:
            return super().forward(mask.cumsum(-1) * mask + 2)

    model = Single(Positions(10, 6))
    with pytest.raises(TargetError, match=r"'layer': .* Positions of .* has a forward of its own, .* exclude_modules"):
        get_peft_model(model, LoraConfig(target_modules=["layer"]))
    assert type(model.layer) is Positions


def test_factors_are_stored_as_peft_stores_them() -> None:
    tensors = get_peft_model_state_dict(on_layer(nn.Embedding(10, 6), r=2))
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "base_model.model.layer.lora_embedding_A": (2, 10),
        "base_model.model.layer.lora_embedding_B": (6, 2),
    }


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_is_warned_of_because_indices_cannot_be_dropped(use_dora: bool) -> None:
    with pytest.warns(UserWarning, match="layer: lora_dropout does not act on embedding layers"):
        model = on_layer(nn.Embedding(10, 6), lora_dropout=0.5, use_dora=use_dora)
    x = torch.arange(10)
    assert torch.equal(model(x), model(x))


def test_half_precision_table_gives_half_precision_rows() -> None:
    model = on_layer(nn.Embedding(10, 6, dtype=torch.bfloat16))
    assert model(torch.arange(10)).dtype is torch.bfloat16


def test_table_that_lookups_renormalise_is_refused() -> None:
    with pytest.raises(TargetError, match=r"'layer': .*max_norm=1.0 .*renormalise.*exclude_modules"):
        on_layer(nn.Embedding(10, 6, max_norm=1.0))
