"""What the joint loss allocates: never logits of all tokens, and for backward what a plain loss keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorafa.alignment import DIVERGENCES, MAPS, Alignment
from lorafa.models import head_loss
from lorafa.models.head_loss import supervised_loss
from toys.adapters import train
from toys.language_models import adapted, llama
from toys.watch import Allocated, Kept

VOCABULARY, ROWS, TOKENS, CHUNK = 2048, 4, 50, 32
POSITIONS = ROWS * (TOKENS - 1)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", CHUNK * 4 * VOCABULARY)


def student(**settings: Any) -> Any:
    model = adapted(llama(vocab_size=VOCABULARY), **settings)
    train(model, 0.2)
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(ROWS * TOKENS).view(ROWS, TOKENS)
    return {"input_ids": ids, "labels": ids.clone()}


def largest(alignment: Alignment, model: Any) -> int:
    """Elements of the largest tensor that any operation of a step makes, forward and backward."""
    with Allocated() as seen:
        alignment.loss(model, batch()).backward()  # type: ignore[no-untyped-call]
    return seen.largest


@pytest.mark.parametrize("name", DIVERGENCES.names())
def test_a_divergence_makes_no_tensor_above_a_chunk_of_logits(name: str) -> None:
    model = student()
    assert largest(Alignment(model, "base", divergence=name), model) == CHUNK * VOCABULARY


@pytest.mark.parametrize("name", MAPS.names())
def test_a_map_makes_no_logits_of_all_tokens(name: str) -> None:
    model = student()
    assert largest(Alignment(model, "base", map=name), model) < POSITIONS * VOCABULARY / 2


def test_a_teacher_of_another_vocabulary_size_makes_none_either() -> None:
    model, other = student(), llama(vocab_size=VOCABULARY + 16)
    assert largest(Alignment(model, other), model) == CHUNK * (VOCABULARY + 16)


def test_the_probe_makes_none_either() -> None:
    model = student()
    alignment = Alignment(model, "snapshot", schedule="cyclic", steps=1000, probe=[batch()])
    with Allocated() as seen:
        alignment.probe(model)
    assert seen.largest == CHUNK * VOCABULARY


@pytest.mark.parametrize("teacher", ["base", "snapshot", "external"])
def test_nothing_of_the_teacher_is_kept_for_the_backward_pass(teacher: str) -> None:
    model = student(lora_dropout=0.0).train()
    given: Any = llama(vocab_size=VOCABULARY) if teacher == "external" else teacher
    alignment = Alignment(model, given, divergence="fkl")
    known = [*model.parameters(), *model.buffers()]
    with Kept(*known) as plain:
        loss = supervised_loss(model, batch())
    with Kept(*known) as joint:
        aligned = alignment.loss(model, batch())
    assert loss.requires_grad
    assert aligned.requires_grad
    assert joint.bytes == plain.bytes
