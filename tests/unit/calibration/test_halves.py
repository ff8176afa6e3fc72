"""Two half samples of a gradient: each is the mean over its own batches, and both together are the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, RankRule, collect_statistics, initialize
from lorafa.errors import CalibrationError
from lorafa.numerics.linalg import full_svd
from toys.calibration import LAYERS, Toy, gradient_matrix, gradients, inputs, loss

RANK = 20
"""Of the smallest layer: every triplet is kept."""


def config(**settings: Any) -> LoraConfig:
    values = {"r": RANK, "target_modules": list(LAYERS), "init_lora_weights": "lora_one", "init_seed": 0}
    return LoraConfig(**(values | settings))  # type: ignore[arg-type]


def assert_cross_validated(found: Any, first: Tensor, second: Tensor) -> None:
    """S_half and cross are those of the gradients of two half samples: u_i^T G2 v_i for the triplets of G1."""
    top = full_svd(first)
    k = int((1e-6 * top.S[0] < top.S).sum())  # below, directions are arbitrary
    held = (top.U[:, :k].mT @ second @ top.Vh[:k].mT).diagonal()
    limit = {"rtol": 1e-8, "atol": 1e-10 * float(top.S[0])}
    torch.testing.assert_close(found["gradient.S_half"][:k], top.S[:k], **limit)
    torch.testing.assert_close(found["gradient.cross"][:k], held, **limit)


@pytest.mark.parametrize("options", [{"dense": True}, {"dense": False}, {"dense": False, "passes": 2}])
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_each_half_is_the_mean_over_its_own_batches(count: int, options: dict[str, Any]) -> None:
    model, data = Toy(), inputs(count)
    found = collect_statistics(model, config(), data, loss=loss, halves=True, **options)
    whole, even, odd = (gradients(model, data[part]) for part in (slice(None), slice(0, None, 2), slice(1, None, 2)))
    for name in LAYERS:
        G = whole[name]
        torch.testing.assert_close(gradient_matrix(found[name]), G, rtol=1e-8, atol=1e-10 * float(G.abs().max()))
        assert_cross_validated(found[name], even[name], odd[name])


def test_two_halves_of_the_same_batches_confirm_each_other_entirely() -> None:
    found = collect_statistics(Toy(), config(), inputs(1) * 3, loss=loss, halves=True)
    for name in LAYERS:
        torch.testing.assert_close(found[name]["gradient.cross"], found[name]["gradient.S_half"])


def by_steps(model: nn.Module, data: list[Tensor]) -> Callable[[], None]:
    def step() -> None:
        for x in data:
            loss(model, x).backward()  # type: ignore[no-untyped-call]

    return step


def test_every_call_of_the_model_in_a_training_step_is_a_batch() -> None:
    model, data = Toy(), inputs(3)
    found = collect_statistics(model, config(), by_steps(model, data), halves=True)
    even, odd = gradients(model, data[::2]), gradients(model, data[1::2])
    for name in LAYERS:
        assert_cross_validated(found[name], even[name], odd[name])


def test_a_loss_that_calls_the_model_twice_has_one_batch() -> None:
    def twice(model: nn.Module, x: Tensor) -> Tensor:
        return (loss(model, x) + loss(model, -x)) / 2

    model, data = Toy(), inputs(3)
    found = collect_statistics(model, config(), data, loss=twice, halves=True)
    even, odd = ([x for one in data[part] for x in (one, -one)] for part in (slice(0, None, 2), slice(1, None, 2)))
    first, second = gradients(model, even), gradients(model, odd)
    for name in LAYERS:
        assert_cross_validated(found[name], first[name], second[name])


class Labelled(Toy):
    """Returns its loss over tokens that have a label, as models of transformers do."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        y = super().forward(x)
        return {"loss": (y * y.sin()).mean()}


def test_halves_are_weighted_by_their_tokens() -> None:
    model, data, tokens = Labelled(), inputs(3), [1, 4, 5]
    labels = [torch.where(torch.arange(6) <= count, 3, -100).repeat(2, 1) for count in tokens]
    batches = [{"x": x, "labels": ids} for x, ids in zip(data, labels, strict=True)]
    found = collect_statistics(model, config(), batches, halves=True, weighting="tokens")
    single = [gradients(Toy(), [x]) for x in data]
    for name in LAYERS:
        G0, G1, G2 = (one[name] for one in single)
        whole = (G0 + 4 * G1 + 5 * G2) / 10
        torch.testing.assert_close(gradient_matrix(found[name]), whole, rtol=1e-8, atol=1e-10)
        assert_cross_validated(found[name], (G0 + 5 * G2) / 6, G1)


def test_a_half_without_batches_is_refused() -> None:
    text = r"one of the two half samples is empty: their batches weigh 1 and 0\. Pass at least two batches"
    with pytest.raises(CalibrationError, match=text):
        collect_statistics(Toy(), config(), inputs(1), loss=loss, halves=True)
    with pytest.raises(CalibrationError, match=text):
        initialize(Toy(), config(r=2), inputs(1), loss=loss, ranks=RankRule("cross_validation"))
    x, none = inputs(1)[0], torch.full((2, 6), -100)
    batches = [{"x": x, "labels": torch.ones_like(none)}, {"x": x, "labels": none}]
    with pytest.raises(CalibrationError, match=r"their batches weigh 10 and 0\."):
        collect_statistics(Labelled(), config(), batches, halves=True, weighting="tokens")
    with pytest.raises(CalibrationError, match=r"None of the 1 batches has a label that counts, so they weigh nothing"):
        collect_statistics(Labelled(), config(), batches[1:], weighting="tokens")
