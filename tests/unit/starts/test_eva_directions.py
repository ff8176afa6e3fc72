"""EVA on an adapter that is there: ranks a layer cannot have, data with too few directions, and which tokens count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import EvaConfig, LoraConfig, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights
from lorafa.calibration.masks import counted
from lorafa.errors import ConfigError, NotAvailableError
from lorafa.starts.eva import prepare_layer_inputs_fn_language_modeling, prepare_model_inputs_fn_language_modeling

IGNORED = -100


def config(r: int, **settings: Any) -> LoraConfig:
    return LoraConfig(target_modules=["0"], r=r, init_lora_weights="eva", eva_config=EvaConfig(**settings))


def test_a_rank_beyond_a_layers_inputs_is_refused_before_the_data_are_looked_at() -> None:
    """More data would not help: a layer of 4 inputs has 4 directions."""

    def unread(model: nn.Module, batch: Any) -> None:
        pytest.fail("the data were looked at")

    text = (
        r"^0: rank 6 is larger than min\(out, in\) = 4 of its weight \(8, 4\), so it has no 6 singular vectors\. Lower "
        r"the rank \(rank_pattern sets it for single layers\) or leave the layer out with exclude_modules\.$"
    )
    with pytest.raises(ConfigError, match=text):
        get_eva_state_dict(nn.Sequential(nn.Linear(4, 8)), [torch.randn(9, 4)], config(6, rho=1.0), unread)


def test_a_rank_beyond_a_layers_inputs_is_shared_out_where_ranks_are() -> None:
    state = get_eva_state_dict(
        nn.Sequential(nn.Linear(4, 8)), [torch.randn(9, 4)], config(6, rho=2.0), show_progress_bar=False
    )
    assert state["0"].shape == (4, 4)


@pytest.mark.parametrize("whiten", [False, True])
def test_too_little_data_gives_the_directions_it_has_and_the_layer_starts_as_by_default(whiten: bool) -> None:
    """Three tokens around their mean span two directions, and the others are no directions at all."""
    data, settings = [torch.randn(3, 8)], config(4, rho=1.0, whiten=whiten)
    model = nn.Sequential(nn.Linear(8, 8))
    A = get_eva_state_dict(model, data, settings, show_progress_bar=False)["0"]
    assert A.any(dim=1).tolist() == [True, True, False, False]
    with pytest.warns(UserWarning, match="not collected yet"):
        adapted = get_peft_model(model, settings)
    text = r"on 1 of 1 layers.* \(its input has 2 singular values other than zero where 4 are needed"
    with pytest.warns(UserWarning, match=text):
        initialize_lora_eva_weights(adapted, data, show_progress_bar=False)
    assert adapted.get_base_model()[0].factor_A("default").any(dim=1).all()


def test_whitened_directions_are_divided_by_the_root_of_their_singular_value() -> None:
    """As PEFT does: variances of the projections, sigma_i^2 / T before, are then as the sigma_i and not all 1."""
    x = torch.randn(200, 8, dtype=torch.float64) * torch.logspace(0, -1, 8)
    layer = nn.Linear(8, 8, dtype=torch.float64)
    plain, whitened = (
        get_eva_state_dict(nn.Sequential(layer), [x], config(4, rho=1.0, whiten=whiten), show_progress_bar=False)["0"]
        for whiten in (False, True)
    )
    torch.testing.assert_close(plain @ plain.mT, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(nn.functional.normalize(whitened), plain)
    sigma, variances = torch.linalg.svdvals(x - x.mean(0))[:4], (x @ whitened.mT).var(0)
    torch.testing.assert_close(variances / variances[0], sigma / sigma[0])


def test_the_data_of_one_process_are_all_there_are_where_it_is_alone() -> None:
    model, data = nn.Sequential(nn.Linear(8, 8)), [torch.randn(9, 8)]
    found = [
        get_eva_state_dict(model, data, config(2), gather_distributed_inputs=both, show_progress_bar=False)["0"]
        for both in (True, False)
    ]
    assert torch.equal(*found)


def test_a_model_that_is_spread_has_no_data_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafa.starts.eva.distributed", lambda: True)
    monkeypatch.setattr("lorafa.starts.eva.can_be_gathered", lambda parameter: True)
    with pytest.raises(NotAvailableError, match=r"by the data of one process, and this model is spread over several"):
        get_eva_state_dict(nn.Sequential(nn.Linear(8, 8)), [], config(2), gather_distributed_inputs=False)


ATTENDED = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
LABELS = torch.tensor([[IGNORED, 5, 7, IGNORED], [5, IGNORED, 5, 5]])
BOTH = torch.tensor([[False, True, True, False], [True, False, False, False]])
MASKS: dict[str, tuple[Tensor | None, Tensor | None, Tensor | None]] = {
    "nothing": (None, None, None),
    "a mask": (ATTENDED, None, ATTENDED.bool()),
    "labels": (None, LABELS, LABELS != IGNORED),
    "both": (ATTENDED, LABELS, BOTH),
    "labels of rows": (ATTENDED, torch.tensor([1, 0]), ATTENDED.bool()),
    "a mask of the encoder": (ATTENDED.repeat(1, 2), LABELS, LABELS != IGNORED),
    "neither of this shape": (ATTENDED.repeat(1, 2), torch.tensor([1, 0]), None),
}


@pytest.mark.parametrize(("attended", "labels", "expected"), MASKS.values(), ids=MASKS)
def test_tokens_count_where_the_masks_of_their_shape_say_so(
    attended: Tensor | None, labels: Tensor | None, expected: Tensor | None
) -> None:
    found = counted(torch.Size((2, 4)), attended, labels, IGNORED)
    assert (found is None) is (expected is None)
    assert found is None or (found.dtype is torch.bool and torch.equal(found, expected))  # type: ignore[arg-type]


def test_the_default_functions_keep_the_tokens_that_count() -> None:
    batch, x = {"attention_mask": ATTENDED, "labels": LABELS}, torch.randn(2, 4, 3)
    for settings, expected in (({}, BOTH), ({"use_label_mask": False}, ATTENDED.bool())):
        found = prepare_model_inputs_fn_language_modeling(batch, config(2, **settings))
        assert found is not None
        assert torch.equal(found, expected)
        assert torch.equal(prepare_layer_inputs_fn_language_modeling(x, found, "0"), x[expected])
    for given in ({}, {"input_ids": LABELS}, LABELS):
        assert prepare_model_inputs_fn_language_modeling(given, config(2)) is None
    assert torch.equal(prepare_layer_inputs_fn_language_modeling(x, None, "0"), x)
