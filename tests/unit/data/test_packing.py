"""Several samples in one row: none is lost, none sees another, and the loss is that of rows of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import lorafa
from lorafa.cli.main import main
from lorafa.data.chat import IGNORE, Sample
from lorafa.data.collate import Collator
from lorafa.data.packing import POSITIONS, Pack, PackCollator, Packs, as_read
from lorafa.models.head_loss import supervised_loss
from lorafa.models.packed import mixes_samples
from toys.language_models import gpt2, llama
from toys.processes import free_ports, run_command, run_group
from toys.workplace import make_workplace, metrics, read
from toys.workplace import settings as settings_of

LENGTHS = (5, 2, 7, 3, 3, 6)


def drawn(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = 30) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(row, [IGNORE] * (number % 2) + row[number % 2 :]) for number, row in enumerate(rows)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 64))
@settings(deadline=None)
def test_every_sample_is_in_one_pack_and_no_two_packs_fit_into_one(lengths: list[int], capacity: int) -> None:
    samples = [Sample([number] * length, [number] * length) for number, length in enumerate(lengths)]
    packs = Packs(samples, lengths, capacity)
    sizes = sorted(len(pack.input_ids) for pack in packs)
    assert sizes[-1] <= capacity
    assert len(packs) == 1 or sizes[0] + sizes[1] > capacity
    assert sorted(sample.input_ids[0] for pack in packs for sample in pack.samples) == list(range(len(lengths)))


def test_what_fits_nowhere_has_a_row_of_its_own() -> None:
    assert [len(pack.samples) for pack in Packs(drawn((9, 2, 2)), (9, 2, 2), 5)] == [1, 2]


def test_a_packed_batch() -> None:
    one, two, three = Sample([1, 2, 3], [IGNORE, 2, 3]), Sample([4, 5], [4, 5]), Sample([6], [6])
    batch = PackCollator(Collator(0))([Pack((one, two)), Pack((three,))])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [6, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3, IGNORE, 5], [IGNORE] * 5]  # 4 and 6 follow nothing of theirs
    assert batch[POSITIONS].tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert as_read(batch).keys() == {"input_ids", "labels", "position_ids"}
    plain = PackCollator(Collator(0))([one, two])
    assert as_read(plain) is plain


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("chunked", [True, False])
def test_loss_and_gradients_are_those_of_rows_of_their_own(make: Any, attention: str, chunked: bool) -> None:
    base = make().double()
    base.config.use_cache = False  # as the trainer sets it
    base.set_attn_implementation(attention)
    model = lorafa.get_peft_model(base, lorafa.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.eval()  # GPT-2 has dropouts of its own
    samples = drawn(vocabulary=base.config.vocab_size)
    collate = PackCollator(Collator(0))
    packs = list(Packs(samples, [len(sample.input_ids) for sample in samples], 11))
    assert len(packs) < len(samples)
    found = []
    for rows in (samples, packs):
        batch = as_read(collate(rows))
        model.zero_grad()
        count = sum(label != IGNORE for sample in samples for label in sample.labels[1:])
        if chunked:
            loss = supervised_loss(model, batch, num_items=count)
        else:
            loss = model(**batch, num_items_in_batch=count).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    for alone, packed in zip(*found, strict=True):
        # transformers computes its own loss in float32
        torch.testing.assert_close(packed, alone, rtol=1e-9 if chunked else 1e-5, atol=1e-12 if chunked else 1e-6)


def test_models_that_mix_the_samples_of_a_row_are_found() -> None:
    assert mixes_samples(llama()) is None
    assert mixes_samples(gpt2()) is None
    sizes = {"vocab_size": 30, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    assert "where others stand before it" in str(mixes_samples(mamba)) or "a trial failed" in str(mixes_samples(mamba))
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=30, hidden_size=16, n_layer=2, n_head=2))
    assert mixes_samples(bloom) is not None
    with torch.device("meta"):
        assert "no weights yet" in str(mixes_samples(llama()))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


PLAIN = ["peft.lora_dropout=0", "optim=sgd", "optim.lr=0.5", "eval.size=0", "train.steps=4"]


def test_a_run_on_packed_rows_is_the_run_on_rows_of_their_own(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [*PLAIN, "train.batch_size=16"]  # all samples in each step, whatever they stand beside
    assert main(["train", *settings_of(workplace, tmp_path / "rows"), *whole]) == 0
    packed = ["train.packing=true", "data.max_length=80"]
    assert main(["train", *settings_of(workplace, tmp_path / "packs"), *whole, *packed]) == 0
    assert "Packed: 16 samples in" in capsys.readouterr().out
    rows, packs = metrics(tmp_path / "rows"), metrics(tmp_path / "packs")
    assert [row["tokens"] for row in packs] == [row["tokens"] for row in rows]
    assert [row["loss"] for row in packs] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    one, other = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("rows", "packs"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)
    assert read(tmp_path / "packs/result.json")["after"]["loss"] == pytest.approx(
        read(tmp_path / "rows/result.json")["after"]["loss"], rel=1e-5
    )


@pytest.mark.slow
def test_two_processes_train_on_packed_rows_what_one_does(workplace: Path, tmp_path: Path) -> None:
    more = [*PLAIN, "train.packing=true", "data.max_length=48", "train.batch_size=2", "train.checkpoint_every=0"]
    assert main(["train", *settings_of(workplace, tmp_path / "one"), *more, "train.batch_size=4"]) == 0
    run_group(run_command, free_ports(1)[0], ["train", *settings_of(workplace, tmp_path / "two"), *more])
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [row["tokens"] for row in two] == [row["tokens"] for row in one]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)


def test_packing_is_refused_where_samples_would_mix(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafa.train.recipe.mixes_samples", lambda model: "because")
    assert main(["train", *settings_of(workplace, tmp_path / "run"), *PLAIN, "train.packing=true"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "train.packing=true needs a model that keeps the samples of a row apart" in said
    assert "they would not be trained as they are: because. Leave it out" in said
    assert not (tmp_path / "run").exists()


def test_a_capacity_beyond_all_samples_takes_no_memory() -> None:
    samples = [Sample([1] * size, [1] * size) for size in (3, 2)]
    assert [len(pack.input_ids) for pack in Packs(samples, [3, 2], 10**12)] == [5]


def test_a_model_of_16_bits_that_mixes_samples_by_little_is_told_from_rounding() -> None:
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4)
    model = transformers.BloomForCausalLM(config).to(torch.bfloat16)
    assert "where others stand before it" in (mixes_samples(model) or "")
    assert mixes_samples(llama().to(torch.bfloat16)) is None
