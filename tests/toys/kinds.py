"""Places to train in with models of other kinds: an encoder with a decoder, and an encoder that tells texts apart."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("good", "fine", "great", "nice", "bad", "poor", "awful", "dull")
FIRST = ("the", "a", "this", "one", "that")
ROWS = [
    {"prompt": f"{first} film is {word}", "completion": "positive" if at < 4 else "negative"}
    for at, word in enumerate(WORDS)
    for first in FIRST
]
STEPS = 12


def word_tokenizer(marks: dict[str, str], ending: str) -> transformers.PreTrainedTokenizerFast:
    """One id a word of ``ROWS``, after the special tokens; ``ending`` says how it puts them around a text."""
    words = sorted({word for row in ROWS for text in row.values() for word in text.split()} | {*ascii_lowercase})
    vocabulary = {word: at for at, word in enumerate([*marks.values(), *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=marks["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(mark, vocabulary[mark]) for mark in marks.values() if mark in ending]
    core.post_processor = processors.TemplateProcessing(single=ending, special_tokens=special)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **marks)


def make_t5(folder: Path, **changes: Any) -> Path:
    """Put ``model/`` (T5, random, two layers) and ``rows.jsonl`` into a folder."""
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = word_tokenizer(marks, "$A </s>")
    small = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    config = transformers.T5Config(vocab_size=len(tokenizer), **(small | changes))
    return _written(folder, transformers.T5ForConditionalGeneration, config, tokenizer)


def make_bert(folder: Path, kind: Any = transformers.BertModel, **changes: Any) -> Path:
    """Put ``model/`` (BERT without a head, random, two layers) and ``rows.jsonl`` into a folder."""
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = word_tokenizer(marks, "[CLS] $A [SEP]")
    small = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 32, "initializer_range": 0.1,
    }  # fmt: skip
    config = transformers.BertConfig(vocab_size=len(tokenizer), **(small | changes))
    return _written(folder, kind, config, tokenizer)


def _written(folder: Path, kind: Any, config: Any, tokenizer: Any) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    torch.manual_seed(0)
    kind(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def settings(place: Path, run_dir: Path) -> list[str]:
    """A short run on the rows of a place."""
    return [
        f"model={place / 'model'}", f"data={place / 'rows.jsonl'}", f"run_dir={run_dir}", "data.eval_size=8",
        "peft.r=4", "peft.lora_dropout=0.1", "optim.lr=3e-2", f"train.steps={STEPS}", "train.batch_size=4",
        "train.checkpoint_every=6", "train.keep_checkpoints=5", "optim.warmup=0",
    ]  # fmt: skip
