"""What a teacher says is kept row by row, serves without it, and is refused for other teachers, data and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa.alignment import DIVERGENCES, Alignment, Cached
from lorafa.alignment import targets as kept_targets
from lorafa.alignment.divergences.letters import Letters
from lorafa.alignment.targets import MANIFEST, bytes_a_position, row_keys
from lorafa.alignment.teachers.snapshot import Snapshot
from lorafa.errors import CheckpointError, ConfigError, DivergedError
from toys.adapters import train
from toys.compare import assert_equal_bits, close
from toys.language_models import adapted, gpt2, llama

IDS = torch.tensor([[4, 7, 1, 9, 3, 2], [2, 8, 8, 5, 1, 6], [9, 1, 4, 4, 6, 6]])
LABELS = torch.tensor([[-100, -100, 1, 9, 3, 2], [-100, 8, 8, 5, -100, -100], [-100, -100, -100, 4, 6, 6]])
BATCH = {"input_ids": IDS, "labels": LABELS}
OTHER = {"input_ids": IDS.flip(0) + 1, "labels": LABELS.flip(0)}
GOLD = LABELS[:, 1:][LABELS[:, 1:] != -100]


def student() -> Any:
    model = adapted(llama().double()).eval()
    torch.manual_seed(1)
    train(model, 0.2)
    return model


def other_model(seed: int = 7) -> Any:
    torch.manual_seed(seed)
    model = llama().double().eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def counted_logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits[:, :-1][LABELS[:, 1:] != -100]
    return found


def filled(folder: Path, model: Any, teacher: Any, **own: Any) -> Cached:
    cached = Cached(folder, teacher, **({"top_k": 5} | own))
    Alignment(model, cached, divergence="fkl")
    cached.fill(model, [BATCH])
    return cached


@pytest.mark.parametrize("teacher", ["base", "external"])
@pytest.mark.parametrize("name", [n for n in DIVERGENCES.names() if n != "logit_mse"])
def test_the_loss_is_that_of_the_letters_of_the_teacher(tmp_path: Path, name: str, teacher: str) -> None:
    model, other = student(), other_model()
    cached = Cached(tmp_path / "t", other if teacher == "external" else "base", top_k=5)
    alignment = Alignment(model, cached, weight=0.7, divergence=name)
    loss = alignment.loss(model, BATCH)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        if teacher == "external":
            theirs = counted_logits(other)
        else:
            with model.disable_adapter():
                theirs = counted_logits(model)
    own = counted_logits(model)
    divergence = DIVERGENCES.get(name)().of_letters(own, Letters.of(theirs, GOLD, 5), GOLD).mean()
    wanted = nn.functional.cross_entropy(own, GOLD) + 0.7 * divergence
    close(loss.detach(), wanted.detach(), 1e-10)
    wanted.backward()  # type: ignore[no-untyped-call]
    for key, p in model.named_parameters():
        if p.grad is not None:
            close(found[key], p.grad, 1e-9)
    assert alignment.last_divergence == pytest.approx(divergence.item(), rel=1e-9)


def test_what_was_filled_serves_without_the_teacher_to_the_bit(tmp_path: Path) -> None:
    model, other = student(), other_model()
    first = filled(tmp_path / "t", model, other)
    one = Alignment(model, first, divergence="fkl")
    wanted = one.loss(model, BATCH)
    again = Alignment(model, Cached(tmp_path / "t", top_k=5), divergence="fkl")
    assert_equal_bits(again.loss(model, BATCH), wanted)
    assert again.teacher_passes == 0
    assert first.fill(model, [BATCH]) == 0
    other.forward = None
    first.release()
    assert_equal_bits(Alignment(model, first, divergence="fkl").loss(model, BATCH), wanted)


def test_rows_are_found_in_any_batch_order_and_padding(tmp_path: Path) -> None:
    model = student()
    cached = filled(tmp_path / "t", model, other_model())
    cached.release()
    right = {
        "input_ids": nn.functional.pad(IDS, (0, 3), value=11), "labels": nn.functional.pad(LABELS, (0, 3), value=-100),
    }  # fmt: skip
    left = {
        "input_ids": nn.functional.pad(IDS, (2, 0), value=11), "labels": nn.functional.pad(LABELS, (2, 0), value=-100),
        "attention_mask": nn.functional.pad(torch.ones_like(IDS), (2, 0)),
    }  # fmt: skip
    whole = cached.told(model, BATCH).letters
    for batch in (right, left):
        assert_equal_bits(cached.told(model, batch).letters.likely, whole.likely)
    turned = {key: value.flip(0) for key, value in BATCH.items()}
    counts = row_keys(BATCH)[1]
    parts = torch.split(whole.likely, counts)
    assert_equal_bits(cached.told(model, turned).letters.likely, torch.cat(parts[::-1]))


def test_padding_before_a_row_is_a_part_of_it_where_positions_are_learnt(tmp_path: Path) -> None:
    model, other = adapted(gpt2().double()).eval(), gpt2().double().eval()
    cached = Alignment(model, Cached(tmp_path / "t", other, top_k=32), divergence="fkl")
    asked = Alignment(model, other, divergence="fkl")
    for before in (0, 2, 5):
        pad = (before, 0)
        batch = {
            "input_ids": nn.functional.pad(IDS, pad), "labels": nn.functional.pad(LABELS, pad, value=-100),
            "attention_mask": nn.functional.pad(torch.ones_like(IDS), pad),
        }  # fmt: skip
        cached.loss(model, batch)
        asked.loss(model, batch)
        assert cached.last_divergence == pytest.approx(asked.last_divergence, rel=1e-5)


def test_rows_differ_by_their_labels_and_by_what_the_model_reads_beside_tokens() -> None:
    keys = row_keys(BATCH)[0]
    assert len(set(keys)) == 3
    fewer = LABELS.clone()
    fewer[0, 2] = -100
    assert row_keys(BATCH | {"labels": fewer})[0][0] != keys[0]
    assert row_keys(BATCH | {"position_ids": torch.arange(6).expand(3, 6)})[0][0] != keys[0]
    after = IDS.clone()
    after[1, 5] = 30  # behind its last label, where a causal model does not look
    assert row_keys(BATCH | {"input_ids": after})[0] == keys
    with pytest.raises(ConfigError, match="'pixels', which is not one number a token"):
        row_keys(BATCH | {"pixels": torch.zeros(3, 4, 4)})
    with pytest.raises(ConfigError, match="'attention_mask', which is not one number a token"):
        row_keys(BATCH | {"attention_mask": torch.zeros(3, 1, 6, 6)})
    for without in ({"labels": LABELS}, {"input_ids": IDS}):
        with pytest.raises(ConfigError, match=r"by their input_ids and labels, found only: (labels|input_ids)"):
            row_keys(without)


def test_a_batch_without_labels_asks_nobody(tmp_path: Path) -> None:
    model = student()
    cached = Cached(tmp_path / "t", other_model(), top_k=5)
    Alignment(model, cached, divergence="fkl")
    assert len(cached.told(model, {"input_ids": IDS, "labels": torch.full_like(LABELS, -100)})) == 0
    assert len(cached.targets) == 0


def test_an_interrupted_fill_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = student(), other_model()
    monkeypatch.setattr(kept_targets, "MOST_PENDING", 1)  # each row is written at once
    cached = Cached(tmp_path / "t", other, top_k=5)
    Alignment(model, cached, divergence="fkl")

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached.fill(model, [BATCH, OTHER], progress=stop)
    again = Cached(tmp_path / "t", other, top_k=5)
    Alignment(model, again, divergence="fkl")
    assert len(again.targets) == 3
    assert again.fill(model, [BATCH, OTHER]) == 3
    assert again.fill(model, [BATCH, OTHER]) == 0


def test_a_state_leaves_nothing_in_memory(tmp_path: Path) -> None:
    model = student()
    alignment = Alignment(model, Cached(tmp_path / "t", other_model(), top_k=5), divergence="fkl")
    wanted = alignment.loss(model, BATCH)
    assert not list((tmp_path / "t").glob("*.safetensors"))
    alignment.state_dict()
    assert_equal_bits(Alignment(model, Cached(tmp_path / "t", top_k=5), divergence="fkl").loss(model, BATCH), wanted)


def test_the_size_is_what_is_said(tmp_path: Path) -> None:
    model = student().float()
    cached = filled(tmp_path / "t", model, other_model().float(), called="big")
    positions = int((LABELS[:, 1:] != -100).sum())
    assert cached.targets.positions == positions
    (file,) = (tmp_path / "t").glob("*.safetensors")
    assert file.stat().st_size - positions * bytes_a_position(5) < 1000
    assert cached.in_words().startswith(f"3 rows of big, {positions} positions with the 5 likeliest tokens of each: 0")


# ---- what is refused


def test_a_cache_of_another_teacher_is_refused_by_name(tmp_path: Path) -> None:
    model = student()
    filled(tmp_path / "t", model, other_model(), called="big")
    with pytest.raises(CheckpointError, match="the targets of another teacher, big, whose weights are not those"):
        Alignment(model, Cached(tmp_path / "t", other_model(8), top_k=5, called="new"), divergence="fkl")


def test_a_cache_of_other_data_is_refused_by_name(tmp_path: Path) -> None:
    model, other = student(), other_model()
    cached = filled(tmp_path / "t", model, other, called="big")
    with pytest.raises(CheckpointError, match=r"holds what big says of other rows: its data are \w{12}, and these are"):
        cached.fill(model, [OTHER])
    alone = Alignment(model, Cached(tmp_path / "t", top_k=5), divergence="fkl")
    with pytest.raises(CheckpointError, match=r"lacks 3 rows of this training: it was made of other data.* and has 3"):
        alone.loss(model, OTHER)


@pytest.mark.parametrize(
    ("own", "divergence", "text"),
    [
        ({"top_k": 6}, "fkl", "was made with top_k=5, and top_k=6 is asked for"),
        ({"top_k": 5}, {"temperature": 2.0}, "was made with temperature=1, and temperature=2 is asked for"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, own: dict[str, Any], divergence: Any, text: str) -> None:
    model, other = student(), other_model()
    filled(tmp_path / "t", model, other)
    chosen = divergence if isinstance(divergence, str) else DIVERGENCES.get("fkl")(**divergence)
    for teacher in (other, None):
        with pytest.raises(CheckpointError, match=text):
            Alignment(model, Cached(tmp_path / "t", teacher, **own), divergence=chosen)


def test_what_is_not_kept_cannot_be_compared(tmp_path: Path) -> None:
    model, other = student(), other_model()
    with pytest.raises(ConfigError, match=r"keeps the teacher's distributions, and inner states are compared here"):
        Alignment(model, Cached(tmp_path / "t", other), map="gram")
    with pytest.raises(ConfigError, match="logit_mse compares all logits, and a cache keeps the 64 likeliest"):
        Alignment(model, Cached(tmp_path / "t", other), divergence="logit_mse")
    with pytest.raises(ConfigError, match="'snapshot' changes while the student is trained"):
        Alignment(model, Cached(tmp_path / "t", Snapshot()))
    with pytest.raises(ConfigError, match=r"A cache is of a model or of 'base', found teacher='ema'"):
        Cached(tmp_path / "t", "ema")
    with pytest.raises(ConfigError, match="top_k must be an integer >= 1"):
        Cached(tmp_path / "t", other, top_k=0)
    assert not (tmp_path / "t").exists()


def test_a_folder_without_targets_needs_the_teacher_and_one_of_other_things_is_left_alone(tmp_path: Path) -> None:
    model = student()
    with pytest.raises(CheckpointError, match="has no targets of a teacher, and there is none to ask"):
        Alignment(model, Cached(tmp_path / "t"), divergence="fkl")
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is not empty and holds no targets of a teacher"):
        Alignment(model, Cached(tmp_path / "u", other_model()), divergence="fkl")


def test_a_teacher_of_another_vocabulary_is_refused_with_and_without_its_model(tmp_path: Path) -> None:
    wide = llama(vocab_size=48).double()
    with pytest.raises(ConfigError, match="The teacher has 48 tokens and the student 32"):
        Alignment(student(), Cached(tmp_path / "t", wide, top_k=5))
    own = adapted(llama(vocab_size=48).double())
    filled(tmp_path / "v", own, llama(vocab_size=48).double())
    with pytest.raises(ConfigError, match="The teacher has 48 tokens and the student 32"):
        Alignment(student(), Cached(tmp_path / "v", top_k=5))


@pytest.mark.parametrize("name", [n for n in DIVERGENCES.names() if n != "logit_mse"])
@pytest.mark.parametrize("sizes", [(200, 202), (202, 200)])
def test_tables_that_are_filled_up_are_compared_on_the_tokens_both_have(
    tmp_path: Path, sizes: tuple[int, int], name: str
) -> None:
    """With all tokens for letters it is what the teacher itself gives, and its gradient."""
    of_student, of_teacher = sizes
    model = adapted(llama(vocab_size=of_student).double()).eval()
    torch.manual_seed(1)
    train(model, 0.2)
    teacher = llama(vocab_size=of_teacher).double().eval()
    torch.manual_seed(2)
    train(teacher, 0.2)
    with torch.no_grad():  # what nothing was trained on may be likely
        for head in (teacher.lm_head, model.get_base_model().lm_head):  # type: ignore[union-attr]
            head.weight[200:] *= 20
    found = []
    for asked in (teacher, Cached(tmp_path / "t", teacher, top_k=200)):
        alignment = Alignment(model, asked, divergence=name)
        model.zero_grad(set_to_none=True)
        alignment.loss(model, BATCH).backward()  # type: ignore[no-untyped-call]
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found.append((alignment.last_divergence, gradients))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)  # logarithms are kept in float32
    for key, grad in found[0][1].items():
        close(found[1][1][key], grad, 1e-4)


def test_a_folder_of_more_tokens_than_the_student_has_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "t", adapted(llama(vocab_size=202)), llama(vocab_size=202))
    smaller = adapted(llama(vocab_size=200))
    alignment = Alignment(smaller, Cached(tmp_path / "t", top_k=5), divergence="fkl")
    with pytest.raises(CheckpointError, match=r"says of 202 tokens, and the student has 200\. Name another"):
        alignment.loss(smaller, BATCH)


def test_nan_of_a_teacher_is_named_and_not_kept(tmp_path: Path) -> None:
    model, other = student(), other_model()
    with torch.no_grad():
        other.lm_head.weight[3] = float("nan")
    alignment = Alignment(model, Cached(tmp_path / "t", other, top_k=5, called="big"), divergence="fkl")
    with pytest.raises(DivergedError, match="The teacher big gives inf or nan for rows of this data"):
        alignment.loss(model, BATCH)
    assert len(alignment.teacher.targets) == 0  # type: ignore[attr-defined]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    model = student()
    filled(tmp_path / "t", model, other_model())
    (file,) = (tmp_path / "t").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged.* Delete it, and its rows are asked"):
        Alignment(model, Cached(tmp_path / "t", top_k=5), divergence="fkl")
    (tmp_path / "t" / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="is of another version of lorafa"):
        Alignment(model, Cached(tmp_path / "t", top_k=5), divergence="fkl")


def test_a_disk_without_room_is_refused_before_the_teacher_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = student(), other_model()
    cached = Cached(tmp_path / "t", other, top_k=5)
    Alignment(model, cached, divergence="fkl")
    other.forward = None
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(kept_targets.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(CheckpointError, match=r"at 10 positions take 0\.0 GiB.*lower align\.top_k from 5"):
        cached.fill(model, [BATCH])
