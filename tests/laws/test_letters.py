"""The law of what is kept of a teacher: a divergence on fewer letters is one all the same, and a bound from below."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa.alignment import DIVERGENCES
from lorafa.alignment.divergences.base import Divergence
from lorafa.alignment.divergences.letters import REMOVED, Letters
from lorafa.errors import ConfigError
from toys.compare import close

ROWS, V = 40, 11
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "fkl": [{}, {"temperature": 2.5}], "rkl": [{}, {"temperature": 0.7}], "js": [{}, {"beta": 0.2}],
    "skew": [{}, {"skew": 0.6}], "tv": [{}, {"temperature": 4.0}], "masked_target": [{}, {"temperature": 2.0}],
}  # fmt: skip
CASES = [(n, s) for n in DIVERGENCES.names() if DIVERGENCES.get(n).settings.takes_letters for s in SETTINGS[n]]
"""Every divergence that can be taken on letters: a new one is missed here by its name."""


def made(name: str, settings: dict[str, Any]) -> Divergence:
    return DIVERGENCES.get(name)(**settings)


def logits(seed: int = 0, rows: int = ROWS, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(2, rows, V, generator=generator, dtype=torch.float64)).unbind()
    return student, teacher, torch.randint(V, (rows,), generator=generator)


def kept(divergence: Divergence, teacher: Tensor, gold: Tensor, top_k: int) -> Letters:
    return Letters.of(teacher, gold, top_k, divergence.temperature)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_it_is_never_above_that_of_all_tokens_and_rises_to_it(name: str, settings: dict[str, Any]) -> None:
    divergence = made(name, settings)
    student, teacher, gold = logits()
    whole, before = divergence(student, teacher, gold), torch.zeros(ROWS, dtype=torch.float64)
    for top_k in range(1, V + 1):
        coarse = divergence.of_letters(student, kept(divergence, teacher, gold, top_k), gold)
        assert bool((coarse <= whole + 1e-12).all())
        assert bool((coarse >= before - 1e-12).all())
        before = coarse
    close(before, whole, 1e-10)


@pytest.mark.parametrize("top_k", [1, 3, V - 1])
def test_it_is_the_kl_of_both_distributions_put_together_to_the_letters(top_k: int) -> None:
    """Written out: the k likeliest of the teacher as they are, and all others as one, of p and of q alike."""
    student, teacher, gold = logits()
    tau = 2.0

    def put_together(z: Tensor, ids: Tensor, dropped: Tensor | None) -> Tensor:
        z = z if dropped is None else z.scatter(1, dropped[:, None], -torch.inf)
        p = (z / tau).softmax(-1)
        return torch.cat([p.gather(1, ids), p.scatter(1, ids, 0.0).sum(-1, keepdim=True)], dim=-1)

    for name, dropped in (("fkl", None), ("masked_target", gold)):
        divergence = made(name, {"temperature": tau})
        told = kept(divergence, teacher, gold, top_k)
        p, q = (put_together(z, told.ids, dropped) for z in (teacher, student))
        wanted = tau**2 * (torch.xlogy(p, p) - torch.xlogy(p, q.clamp_min(1e-300))).sum(-1)
        close(divergence.of_letters(student, told, gold), wanted, 1e-10)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_it_is_zero_for_the_teacher_itself_whose_gradient_is_none(name: str, settings: dict[str, Any]) -> None:
    divergence = made(name, settings)
    student, teacher, gold = logits()
    told = kept(divergence, teacher, gold, 4)
    value, grad = divergence.of_letters_with_gradient(teacher.clone(), told, gold)
    close(value, torch.zeros_like(value), torch.float64)
    if name != "tv":  # which has a kink there
        close(grad, torch.zeros_like(grad), torch.float64)
    assert bool((divergence.of_letters(student, told, gold) > 0).all())


@pytest.mark.parametrize("top_k", [1, 4, V - 1, V])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_closed_form_is_the_definition_and_its_gradient(name: str, settings: dict[str, Any], top_k: int) -> None:
    divergence = made(name, settings)
    student, teacher, gold = logits()
    told = kept(divergence, teacher, gold, top_k)
    student.requires_grad_()
    value = divergence.of_letters(student, told, gold)
    value.sum().backward()  # type: ignore[no-untyped-call]
    found, grad = divergence.of_letters_with_gradient(student.detach(), told, gold)
    close(found, value.detach(), 1e-12)
    assert student.grad is not None
    close(grad, student.grad, 1e-11)
    close(grad.sum(dim=-1), torch.zeros(ROWS, dtype=torch.float64), torch.float64)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_finite_differences_agree(name: str, settings: dict[str, Any]) -> None:
    """Through the normalizer, too: with the rest as a letter nothing of the gradient has to be stopped."""
    divergence = made(name, settings)
    student, teacher, gold = logits(seed=3, rows=2)
    told = kept(divergence, teacher, gold, 3)
    _, grad = divergence.of_letters_with_gradient(student, told, gold)
    for row in range(2):
        for token in range(V):
            ends = []
            for step in (1e-6, -1e-6):
                moved = student.clone()
                moved[row, token] += step
                ends.append(divergence.of_letters(moved, told, gold)[row])
            close((ends[0] - ends[1]) / 2e-6, grad[row, token], 1e-6)


def test_what_is_kept_is_a_distribution_with_and_without_the_gold_token() -> None:
    _, teacher, gold = logits(rows=200)
    told, p = Letters.of(teacher, gold, 4), teacher.softmax(-1)
    letters = told.log_probs(gold, without_gold=False).exp()
    close(letters.sum(-1), torch.ones(200, dtype=torch.float64), 1e-12)
    close(letters[:, :-1], p.gather(1, told.ids), 1e-12)
    without = told.log_probs(gold, without_gold=True).exp()
    is_gold = told.ids == gold[:, None]
    left = 1 - p.gather(1, gold[:, None])
    close(without[:, :-1], (p.gather(1, told.ids) / left).masked_fill(is_gold, 0.0), 1e-10)
    close(without.sum(-1), torch.ones(200, dtype=torch.float64), 1e-12)


def test_a_sure_teacher_leaves_finite_numbers_in_float32() -> None:
    """The likeliest token has all but 1e-30 of the teacher, and another token all of the student."""
    teacher = torch.full((2, V), -70.0)
    teacher[:, 1] = 0.0
    student = torch.zeros(2, V)
    student[:, 5] = 60.0
    gold = torch.tensor([1, 2])
    for name, settings in CASES:
        divergence = made(name, settings)
        for top_k in (2, V):
            told = kept(divergence, teacher, gold, top_k)
            value, grad = divergence.of_letters_with_gradient(student.clone(), told, gold)
            assert bool(value.isfinite().all())
            assert bool(grad.isfinite().all())


def test_the_gold_token_has_no_gradient_in_masked_target_among_the_likeliest_or_not() -> None:
    student, teacher, gold = logits(rows=200)
    _, grad = made("masked_target", {}).of_letters_with_gradient(student, Letters.of(teacher, gold, 4), gold)
    assert bool((grad.gather(1, gold[:, None]) == 0).all())


def test_what_compares_all_logits_is_refused() -> None:
    student, teacher, gold = logits()
    with pytest.raises(ConfigError, match="logit_mse compares all logits, and a cache keeps the likeliest tokens"):
        made("logit_mse", {}).of_letters(student, Letters.of(teacher, gold, 4), gold)
    assert not DIVERGENCES.get("logit_mse").settings.takes_letters
    assert REMOVED < -1e29
