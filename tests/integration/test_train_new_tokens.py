"""`model.add_tokens`: their rows are trained, kept with the adapter, and read back with their tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafa import AutoPeftModelForCausalLM
from lorafa.cli.main import main
from lorafa.data.chat import encode_all
from lorafa.data.collate import Collator
from lorafa.data.sources import load_records
from lorafa.evals.loss import answer_loss
from toys.workplace import ROWS, at_step, make_workplace, metrics, read, settings

NEW = "model.add_tokens=['<sum>','</sum>']"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "apart"])
def workplace(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("work"), tie_word_embeddings=request.param)
    rows = [row | {"answer": f"<sum>{row['answer']}</sum>"} for row in ROWS]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.matrix(2, each_word=False)
def test_new_tokens_are_trained_kept_and_resumed(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, cut = tmp_path / "run", tmp_path / "cut"
    arguments = [*settings(workplace, run), "eval.size=0", NEW]
    assert main(["train", *arguments]) == 0
    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    new = tokenizer.convert_tokens_to_ids(["<sum>", "</sum>"])
    model = AutoPeftModelForCausalLM.from_pretrained(str(run / "adapter"))
    merged = model.merge_and_unload()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(base, name)().weight, getattr(merged, name)().weight
        assert len(after) == len(tokenizer)
        assert torch.equal(after[: len(before)], before)
        old = AutoTokenizer.from_pretrained(workplace / "model")
        start = before[old("<sum>", add_special_tokens=False).input_ids].mean(0)
        assert (after[new[0]] - start).abs().max() > 1e-3
    records = load_records(str(workplace / "rows.jsonl"), train_size=None, eval_size=4, seed=0)
    heldout = encode_all(records.heldout, tokenizer, 256)
    assert all(new[0] in sample.labels for sample in heldout.samples)
    loss = answer_loss(merged, heldout.samples, Collator(0), 32)
    assert loss == pytest.approx(read(run / "result.json")["after"]["loss"], rel=1e-4)
    with monkeypatch.context() as patch:
        at_step(patch, 6)
        assert main(["train", *settings(workplace, cut), "eval.size=0", NEW]) == 130
    assert main(["train", f"train.resume={cut}"]) == 0
    assert [row["loss"] for row in metrics(cut)] == [row["loss"] for row in metrics(run)]
    again = [f"peft.adapter={run / 'adapter'}", f"run_dir={tmp_path / 'more'}", "train.steps=2", "eval.size=0", NEW]
    assert main(["train", f"model={workplace / 'model'}", f"data={workplace / 'rows.jsonl'}", *again]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["peft.trainable_token_indices=[3]"],
        ["peft.trainable_token_indices={embed_tokens:[3]}"],
        ["peft.modules_to_save=[embed_tokens,lm_head]", "peft.ensure_weight_tying=true"],
        ["peft=full_ft"],
    ],
)
def test_beside_other_ways_to_train_a_table(workplace: Path, tmp_path: Path, more: list[str]) -> None:
    arguments = [text for text in settings(workplace, tmp_path / "run") if not text.startswith("peft.")]
    assert main(["train", *arguments, "eval.size=0", "train.steps=2", NEW, *more]) == 0
