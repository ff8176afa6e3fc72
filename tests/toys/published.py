"""The data sets of published scripts, as the tests know them: a row of each with its text, and a Hub that has them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lorafa.data import DATASETS
from lorafa.data.records import Record, Records
from lorafa.data.sets.published import Published
from lorafa.data.sources import load_records

TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
SIMILAR = "classify the semantic similarity of the text: "
ENTAILS = "classify whether the premise entails the hypothesis: "
CODE = "Use print:\n```python\nprint(1)\n```\nIt prints 1.\n```\n1\n```"
GSM = "Ann has 2.\n#### 2"
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "sst2": ({"sentence": "a fine film", "label": 1, "idx": 0},
             "classify the sentiment of the text: a fine film\nresult: ", "positive"),
    "cola": ({"sentence": "Him run.", "label": 0, "idx": 0},
             "classify the grammaticality of the text: Him run.\nresult: ", "unacceptable"),
    "qqp": ({"question1": "Why?", "question2": "How?", "label": 0}, f"{SIMILAR}Why?\nHow?\nresult: ", "different"),
    "mrpc": ({"sentence1": "A.", "sentence2": "B.", "label": 1}, f"{SIMILAR}A.\nB.\nresult: ", "equivalent"),
    "mnli": ({"premise": "A.", "hypothesis": "B.", "label": 2}, f"{SIMILAR}A.\nB.\nresult: ", "contradiction"),
    "qnli": ({"question": "Who?", "sentence": "Ann.", "label": 1},
             "classify the semantic similarity of the question and the sentence: Who?\nAnn.\nresult: ",
             "not_entailment"),
    "emo": ({"text": "oh no", "label": 2}, "classify the emotion of the text: oh no\nresult: ", "sad"),
    "squad": ({"id": "1", "title": "t", "question": "Who?", "context": "Ann did.",
               "answers": {"text": ["Ann", "Ann did"], "answer_start": [0, 0]}},
              "answer the question: Who?\ncontext: Ann did.\nresult: ", "Ann, Ann did"),
    "boolq": ({"question": "is it", "passage": "It is.", "label": 1},
              "answer the question by the passage with true or false: is it\nIt is.\nresult: ", "true"),
    "cb": ({"premise": "A.", "hypothesis": "B", "label": 2}, f"{ENTAILS}A.\nB\nresult: ", "neutral"),
    "copa": ({"premise": "It fell.", "choice1": "It broke.", "choice2": "It flew.", "question": "effect", "label": 0},
             "choose the effect of the premise: It fell.\nchoice1: It broke.\nchoice2: It flew.\nresult: ", "choice1"),
    "rte": ({"premise": "A.", "hypothesis": "B.", "label": 1}, f"{ENTAILS}A.\nB.\nresult: ", "not_entailment"),
    "wic": ({"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "label": 1},
            "classify whether the word has the same meaning in both sentences: bank\nA bank.\nThe bank.\nresult: ",
            "same"),
    "alpaca": ({"instruction": "Add.", "input": "1, 2", "output": "3"},
               "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n", "3"),
    "alpaca_gpt4": ({"instruction": "Speak.", "input": "", "output": "Hi"},
                    f"{TASK}### Instruction:\nSpeak.\n\n### Response:\n", "Hi"),
    "commonsense_reasoning": (
        {"instruction": "True or false?", "input": "", "output": "the correct answer is true", "answer": "true"},
        f"{TASK}### Instruction:\nTrue or false?\n\n### Response:\n", "the correct answer is true"),
    "gsm8k": ({"question": "How many?", "answer": GSM}, "Q: How many?\nA: ", GSM),
    "meta_math": ({"query": "How many?", "response": f"{GSM}\nThe answer is: 2", "type": "GSM_SV"},
                  "Q: How many?\nA: ", GSM),
    "meta_math_full": ({"query": "How many?", "response": f"{GSM}\nThe answer is: 2", "type": "MATH_SV"},
                       "Q: How many?\nA: ", GSM),
    "codefeedback": ({"query": "Print 1.", "answer": CODE, "lang": "python"},
                     f"{TASK}### Instruction:\nPrint 1.\n\n### Response:\n", "Use print:\n```python\nprint(1)\n```"),
    "wizard_lm": ({"instruction": "Speak.", "output": "Hi", "instruction_zh": "x", "output_zh": "y"},
                  f"{TASK}### Instruction:\nSpeak.\n\n### Response:\n", "Hi"),
    "flan": ({"inputs": "Say hi.", "targets": "hi", "task": "t"},
             f"{TASK}### Instruction:\nSay hi.\n\n### Response:\n", "hi"),
    "flan_v2": ({"inputs": "Say hi.", "targets": "hi", "task": "t"}, "Say hi.", "hi"),
}  # fmt: skip
"""Name -> (a row as the Hub has it, what is asked, what is trained)."""
PLACES: dict[str, tuple[str, str | None, str | None]] = {
    **{name: ("nyu-mll/glue", name, "validation") for name in ("sst2", "cola", "qqp", "mrpc", "qnli")},
    "mnli": ("nyu-mll/glue", "mnli", "validation_matched"),
    **{name: ("aps/super_glue", name, "validation") for name in ("boolq", "cb", "copa", "rte", "wic")},
    "emo": ("SemEvalWorkshop/emo", None, "test"),
    "squad": ("rajpurkar/squad", None, "validation"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "alpaca": ("yahma/alpaca-cleaned", None, None),
    "alpaca_gpt4": ("yahma/alpaca-cleaned", None, None),
    "commonsense_reasoning": ("zwhe99/commonsense_170k", None, None),
    "meta_math": ("meta-math/MetaMathQA", None, None),
    "meta_math_full": ("meta-math/MetaMathQA", None, None),
    "codefeedback": ("m-a-p/CodeFeedback-Filtered-Instruction", None, None),
    "wizard_lm": ("silk-road/Wizard-LM-Chinese-instruct-evol", None, None),
    "flan": ("Muennighoff/flan", None, None),
    "flan_v2": ("SirNeural/flan_v2", None, None),
}
"""Name -> (Hub id, subset, the split that is held out, where it is another one)."""
SPLITS = [name for name, (_, _, split) in PLACES.items() if split is not None]


def numbered(name: str, numbers: range) -> list[dict[str, Any]]:
    """Rows that differ in their first text."""
    row = ROWS[name][0]
    first = next(key for key, value in row.items() if isinstance(value, str) and key not in ("id", "title"))
    return [row | {first: f"{row[first]} {number}"} for number in numbers]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """A file of rows in the form that its name says."""
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            cells = [{key: json.dumps(v) if isinstance(v, dict) else v for key, v in row.items()} for row in rows]
            table.writerows(cells)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(name: str, *, eval_size: Any = 0, train_size: int | None = None, seed: int = 0, **settings: Any) -> Records:
    """The records of a data set, none held out where nothing is said."""
    return load_records(name, train_size=train_size, eval_size=eval_size, seed=seed, **settings)


def texts(record: Record) -> tuple[str, str]:
    """(what is asked, what is trained)."""
    prompt, answer = record.messages
    assert (prompt.role, answer.role) == ("user", "assistant")
    return prompt.content, answer.content


class Hub:
    """Stands in for ``datasets.load_dataset``, and keeps what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **splits: list[dict[str, Any]]) -> None:
        import datasets

        self.splits = splits
        self.asked: list[tuple[Any, ...]] = []
        self.read = 0
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)

    def load_dataset(self, name: str, subset: str | None, *, split: str, **settings: Any) -> Any:
        import datasets

        self.asked.append((name, subset, split, settings))
        if settings.get("streaming"):
            return self.stream(split)
        return datasets.Dataset.from_list(self.splits[split])

    def stream(self, split: str) -> Iterator[dict[str, Any]]:
        for row in self.splits[split]:
            self.read += 1
            yield row


def published(name: str) -> Published:
    """What a line of ``DATASETS`` was made of."""
    found = getattr(DATASETS.get(name).load, "__self__", None)
    assert isinstance(found, Published)
    return found
