"""KappaTune: layers ranked by the condition numbers of their weights, as PEFT ranks them."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from peft.helpers import KappaTuneSelector as TheirSelector
from torch import nn

import lorafa
from lorafa import KappaTuneSelector, LoraConfig, find_kappa_target_modules, get_peft_model
from lorafa.backends.nf4 import NF4Linear
from lorafa.errors import BackendError, ConfigError
from lorafa.surgery.kappa import condition_number
from toys.compare import assert_unchanged, everything
from toys.language_models import gpt2, llama, mixtral
from toys.models import Linears


def with_spectrum(*values: float, out: int = 6, in_: int = 5, seed: int = 0) -> torch.Tensor:
    """A matrix (out, in) in float64 with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    U, _ = torch.linalg.qr(torch.randn(out, len(values), generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(in_, len(values), generator=generator, dtype=torch.float64))
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ V.T


def test_a_condition_number_is_the_largest_singular_value_over_the_smallest() -> None:
    assert condition_number(with_spectrum(6, 5, 4, 3, 2)) == pytest.approx(3, rel=1e-7)
    assert condition_number(with_spectrum(6, 5, 4, 3, 2).T) == pytest.approx(3, rel=1e-7)
    assert condition_number(7 * with_spectrum(6, 5, 4, 3, 2)) == pytest.approx(3, rel=1e-7)
    assert condition_number(torch.eye(4)) == pytest.approx(1, rel=1e-6)


def test_of_a_stack_it_is_the_mean_over_experts() -> None:
    stack = torch.stack([with_spectrum(6, 5, 4, 3, 2), with_spectrum(9, 5, 4, 3, 1, seed=1)])
    assert condition_number(stack) == pytest.approx((3 + 9) / 2, rel=1e-7)


def test_singular_weights_come_last() -> None:
    assert condition_number(with_spectrum(6, 5, 4)) > 1e7
    assert condition_number(torch.zeros(3, 3)) == float("inf")


def ranked() -> nn.Module:
    """Three layers with condition numbers 9, 2 and 4."""
    model = nn.Sequential(*(nn.Linear(5, 6) for _ in range(3)))
    for i, smallest in enumerate((1.0, 4.5, 2.25)):
        model[i].weight.data = with_spectrum(9, 8, 7, 6, smallest, seed=i).float()
    return model


def test_layers_are_chosen_by_share_number_and_threshold() -> None:
    selector = KappaTuneSelector(ranked(), show_progress=False)
    assert selector.get_best_targets() == ["1", "2", "0"]
    assert selector.get_best_targets(top_p=0.7) == ["1", "2"]
    assert selector.get_best_targets(top_p=0.1) == ["1"], "at least one"
    assert selector.get_best_targets(num_modules=2) == ["1", "2"]
    assert selector.get_best_targets(num_modules=99) == ["1", "2", "0"]
    assert selector.get_best_targets(threshold=4.1) == ["1", "2"]
    assert selector.get_best_target_parameters() == []


def test_one_call_gives_what_a_config_takes() -> None:
    model = ranked()
    before = everything(model)
    found = find_kappa_target_modules(model, top_p=0.4)
    assert_unchanged(before, model)
    assert found == {"target_modules": ["1"], "target_parameters": None}
    adapted = get_peft_model(model, LoraConfig(r=2, **found))  # type: ignore[arg-type]
    assert [name for name, m in adapted.base_model.model.named_children() if hasattr(m, "lora_A")] == ["1"]
    assert find_kappa_target_modules(adapted.base_model.model, top_p=0.4) == found, "adapters change no number"


@pytest.mark.parametrize("make", [llama, mixtral, Linears], ids=["llama", "mixtral", "linears"])
def test_the_choice_is_pefts(make: type[nn.Module]) -> None:
    torch.manual_seed(3)
    model = make()
    ours, theirs = KappaTuneSelector(model, show_progress=False), TheirSelector(model, show_progress=False)
    for given in ({}, {"top_p": 0.3}, {"num_modules": 2}, {"threshold": 30.0}):
        assert ours.get_best_targets(**given) == theirs.get_best_targets(**given)  # type: ignore[arg-type]
        found = ours.get_best_target_parameters(**given)  # type: ignore[arg-type]
        assert found == theirs.get_best_target_parameters(**given)
    expected = peft.find_kappa_target_modules(model, show_progress=False)
    assert find_kappa_target_modules(model, show_progress=False) == expected


def test_layers_of_gpt2_and_codes_are_candidates_too() -> None:
    """PEFT asks for nn.Linear: it passes over Conv1D."""
    names = KappaTuneSelector(gpt2(), show_progress=False).get_best_targets()
    assert "transformer.h.0.attn.c_attn" in names
    assert "lm_head" in names
    layer = nn.Linear(64, 64)
    model = nn.Sequential(layer, NF4Linear.from_linear(layer))
    selector = KappaTuneSelector(model, show_progress=False)
    assert set(selector.get_best_targets()) == {"0", "1"}


def test_large_weights_are_left_out_and_named() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 40))
    with pytest.warns(UserWarning, match="1 weights have more than max_dim_size_to_analyze=16 rows or columns.*: 1"):
        assert KappaTuneSelector(model, 16, show_progress=False).get_best_targets() == ["0"]


def test_layers_that_compute_with_another_weight_are_left_out_and_named() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(UserWarning, match="1 linear layers compute with another weight than the one they store.*: 1"):
        assert KappaTuneSelector(model, show_progress=False).get_best_targets() == ["0"]


def test_other_suffixes_name_other_stacks() -> None:
    model = nn.Module()
    model.block = nn.Module()
    model.block.w = nn.Parameter(torch.randn(2, 3, 4))
    assert KappaTuneSelector(model, show_progress=False).get_best_target_parameters() == []
    selector = KappaTuneSelector(model, moe_param_suffixes=(".w",), show_progress=False)
    assert selector.get_best_target_parameters() == ["block.w"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"top_p": 0.2, "num_modules": 2}, "top_p=0.2 and num_modules=2 choose by different rules"),
        ({"top_p": 0.0}, r"top_p must be the share of layers to take, in \(0, 1\], found 0.0"),
        ({"top_p": 1.5}, "found 1.5"),
        ({"num_modules": 0}, "num_modules"),
        ({"threshold": -1.0}, "threshold must be a number > 0"),
    ],
)
def test_wrong_choices_are_refused(given: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        KappaTuneSelector(ranked(), show_progress=False).get_best_targets(**given)  # type: ignore[arg-type]


def test_weights_without_values_are_refused() -> None:
    model = ranked()
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(BackendError, match="1: its weight holds nan or inf, so it has no condition number"):
        KappaTuneSelector(model, show_progress=False).get_best_targets()
    with pytest.raises(BackendError, match="0: its weight has no values"):
        KappaTuneSelector(ranked().to("meta"), show_progress=False).get_best_targets()
    with pytest.raises(ConfigError, match="max_dim_size_to_analyze"):
        KappaTuneSelector(model, 0)


def test_a_bar_is_shown_and_gone(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lorafa.find_kappa_target_modules(ranked(), top_p=1.0)["target_modules"] == ["1", "2", "0"]
    assert capsys.readouterr().out.strip() == ""
