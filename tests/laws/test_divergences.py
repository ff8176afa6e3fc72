"""The law of divergences: 0 for equal distributions and never less, and a gradient that is that of the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa.alignment import DIVERGENCES
from lorafa.alignment.divergences.base import REMOVED, Divergence
from lorafa.errors import ConfigError
from toys.compare import close

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "fkl": [{}, {"temperature": 2.5}],
    "rkl": [{}, {"temperature": 0.7}],
    "js": [{}, {"beta": 0.2}, {"beta": 0.9, "temperature": 3.0}],
    "skew": [{}, {"skew": 0.6}, {"temperature": 2.0}],
    "tv": [{}, {"temperature": 4.0}],
    "logit_mse": [{}],
    "masked_target": [{}, {"temperature": 2.0}],
}
CASES = [(name, settings) for name in DIVERGENCES.names() for settings in SETTINGS[name]]
"""Every registered divergence: a new one is missed here by its name."""


def made(name: str, settings: dict[str, Any]) -> Divergence:
    return DIVERGENCES.get(name)(**settings)


def logits(seed: int = 0, rows: int = 6, vocabulary: int = 9, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)).unbind()
    return student, teacher, torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_closed_form_is_the_definition_and_its_gradient(name: str, settings: dict[str, Any]) -> None:
    divergence = made(name, settings)
    student, teacher, gold = logits()
    student.requires_grad_()
    value = divergence(student, teacher, gold)
    value.sum().backward()  # type: ignore[no-untyped-call]
    found, grad = divergence.with_gradient(student.detach().clone(), teacher.clone(), gold)
    close(found, value.detach(), 1e-12)
    close(grad, student.grad, 1e-12)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_finite_differences_agree(name: str, settings: dict[str, Any]) -> None:
    divergence = made(name, settings)
    student, teacher, gold = logits(seed=3, rows=2, vocabulary=5)
    _, grad = divergence.with_gradient(student.clone(), teacher.clone(), gold)
    step = 1e-6
    for row in range(2):
        for token in range(5):
            ends = []
            for sign in (step, -step):
                moved = student.clone()
                moved[row, token] += sign
                ends.append(divergence(moved, teacher, gold)[row])
            close((ends[0] - ends[1]) / (2 * step), grad[row, token], 1e-6)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_it_is_zero_for_equal_distributions_and_positive_otherwise(name: str, settings: dict[str, Any]) -> None:
    divergence = made(name, settings)
    student, teacher, gold = logits(rows=200)
    assert bool((divergence(student, teacher, gold) > 0).all())
    shifted = teacher + torch.linspace(-3, 3, len(teacher), dtype=torch.float64)[:, None]  # the same distribution
    close(divergence(shifted, teacher, gold), torch.zeros(len(teacher), dtype=torch.float64), torch.float64)
    value, grad = divergence.with_gradient(teacher.clone(), teacher.clone(), gold)
    close(value, torch.zeros_like(value), torch.float64)
    close(grad, torch.zeros_like(grad), torch.float64)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_gradient_moves_no_constant(name: str, settings: dict[str, Any]) -> None:
    """Logits plus a constant are the same distribution, so the gradient sums to 0 at each position."""
    student, teacher, gold = logits()
    _, grad = made(name, settings).with_gradient(student, teacher, gold)
    close(grad.sum(dim=-1), torch.zeros(len(grad), dtype=torch.float64), torch.float64)


def test_jensen_shannon_is_symmetric_and_bounded() -> None:
    student, teacher, gold = logits(rows=300, scale=20.0)
    js = made("js", {})
    close(js(student, teacher, gold), js(teacher, student, gold), 1e-12)
    assert float(js(student, teacher, gold).max()) <= math.log(2) + 1e-12
    for other in ("tv", "skew"):
        bound = {"tv": 1.0, "skew": -math.log(0.1)}[other]
        assert float(made(other, {})(student, teacher, gold).max()) <= bound + 1e-12


@pytest.mark.parametrize("tau", [0.6, 1.0, 3.0])
def test_each_is_its_formula_written_out(tau: float) -> None:
    """From the distributions themselves, with the power of the temperature that each has."""
    student, teacher, gold = logits()
    p, q, b, a = (teacher / tau).softmax(-1), (student / tau).softmax(-1), 0.3, 0.2
    m = b * p + (1 - b) * q
    wanted = {
        "fkl": tau**2 * kl(p, q), "rkl": tau**2 * kl(q, p), "js": tau**2 * (b * kl(p, m) + (1 - b) * kl(q, m)),
        "skew": tau**2 * kl(p, (1 - a) * q + a * p), "tv": (p - q).abs().sum(-1) / 2,
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {"js": {"beta": b}, "skew": {"skew": a}}
    for name, value in wanted.items():
        close(made(name, {"temperature": tau} | own.get(name, {}))(student, teacher, gold), value, 1e-12)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_jensen_shannon_goes_over_into_both_kls_and_skewed_kl_into_the_forward_one(tau: float) -> None:
    """js / beta -> fkl for beta -> 0, js / (1 - beta) -> rkl for beta -> 1; their gradients too, which the bounded ones
    stay below."""
    student, teacher, gold = logits(scale=0.8)

    def both(name: str, **own: Any) -> tuple[Tensor, Tensor]:
        return made(name, {"temperature": tau} | own).with_gradient(student.clone(), teacher.clone(), gold)

    small = 1e-7
    for found, limit, share in (
        (both("js", beta=small), both("fkl"), small),
        (both("js", beta=1 - small), both("rkl"), small),
        (both("skew", skew=small), both("fkl"), 1.0),
    ):
        for part, wanted in zip(found, limit, strict=True):
            close(part / share, wanted, 1e-5)
    close(both("skew", skew=1 - small)[0], torch.zeros(len(gold), dtype=torch.float64), torch.float64)
    one = made("skew", {"skew": 1 - 1e-3})(student, teacher, gold)  # -> (1 - a)^2 / 2 chi^2(q | p)
    p, q = teacher.softmax(-1), student.softmax(-1)
    close(one / 1e-6, ((q - p).square() / p).sum(-1) / 2, 2e-2)


@pytest.mark.parametrize("tau", [0.5, 3.0])
def test_bounds_are_multiplied_by_the_square_of_the_temperature(tau: float) -> None:
    student, teacher, gold = logits(rows=300, scale=20.0 * tau)
    for name, bound in (("js", tau**2 * math.log(2)), ("skew", -(tau**2) * math.log(0.1)), ("tv", 1.0)):
        value = made(name, {"temperature": tau})(student, teacher, gold)
        assert 0.9 * bound < float(value.max()) <= bound * (1 + 1e-12)


def test_gradients_keep_their_size_when_the_temperature_rises() -> None:
    """tau^2 for KLs: at high temperatures neither value nor gradient depends on it; without it they would vanish."""
    student, teacher, gold = logits()
    for name in ("fkl", "rkl", "js", "skew", "masked_target"):
        found = [
            made(name, {"temperature": tau}).with_gradient(student.clone(), teacher.clone(), gold) for tau in (1e3, 4e3)
        ]
        for one, other in zip(*found, strict=True):
            close(one, other, 1e-2)


def test_forward_kl_becomes_the_error_of_logits_at_high_temperatures() -> None:
    """tau^2 KL -> 1 / (2 V) ||z_S - z_T||^2 of centred logits (arXiv:1503.02531, section 2.1)."""
    student, teacher, gold = logits()
    hot = made("fkl", {"temperature": 1e4})(student, teacher, gold)
    close(hot, made("logit_mse", {})(student, teacher, gold) / 2, 1e-3)


def test_the_gradient_of_forward_kl_is_the_difference_of_the_distributions() -> None:
    student, teacher, gold = logits()
    tau = 3.0
    q, p = (student / tau).softmax(-1), (teacher / tau).softmax(-1)
    _, grad = made("fkl", {"temperature": tau}).with_gradient(student, teacher, gold)
    close(grad, tau * (q - p), 1e-12)


def test_a_masked_target_leaves_the_gold_token_alone() -> None:
    student, teacher, gold = logits()
    value, grad = made("masked_target", {}).with_gradient(student.clone(), teacher.clone(), gold)
    assert bool((grad.gather(1, gold[:, None]) == 0).all())
    raised = student.scatter(1, gold[:, None], 50.0)  # whatever is said of it
    close(made("masked_target", {})(raised, teacher, gold), value, 1e-12)
    rest = torch.ones_like(student).scatter(1, gold[:, None], 0.0).bool()
    kept_p, kept_q = teacher[rest].view(6, 8).softmax(-1), student[rest].view(6, 8).softmax(-1)
    close(value, (kept_p * (kept_p / kept_q).log()).sum(-1), 1e-12)


def test_a_removed_token_has_no_probability_and_spoils_nothing() -> None:
    student, teacher, gold = logits()
    student[:, 2] = teacher[:, 2] = REMOVED
    for name in DIVERGENCES.names():
        if name != "logit_mse":
            value, grad = made(name, {}).with_gradient(student.clone().float(), teacher.clone().float(), gold)
            assert bool(value.isfinite().all())
            assert bool((grad[:, 2] == 0).all())


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("fkl", {"temperature": 0}, "temperature must be a number above 0, found 0"),
        ("fkl", {"temperature": "hot"}, "temperature must be a number above 0, found 'hot'"),
        ("js", {"beta": 1.0}, "beta must be a number between 0 and 1, found 1.0"),
        ("skew", {"skew": 0.0}, "for 0 take fkl"),
        ("logit_mse", {"temperature": 2.0}, "compares logits and has no temperature"),
    ],
)
def test_settings_without_meaning_are_refused(name: str, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        made(name, settings)
