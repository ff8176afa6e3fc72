"""Rows, samples and batches to train on: ``sources.load_records`` -> ``chat.encode_all`` -> ``collate.Collator``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.data.entry import ChatTemplate, DataSet

DATASETS: Registry[DataSet] = Registry(
    "data set",
    {
        "alpaca": "lorafa.data.sets.alpaca:ALPACA",
        "alpaca_gpt4": "lorafa.data.sets.alpaca_gpt4:ALPACA_GPT4",
        "boolq": "lorafa.data.sets.boolq:BOOLQ",
        "cb": "lorafa.data.sets.cb:CB",
        "codefeedback": "lorafa.data.sets.codefeedback:CODEFEEDBACK",
        "cola": "lorafa.data.sets.cola:COLA",
        "commonsense_reasoning": "lorafa.data.sets.commonsense_reasoning:COMMONSENSE_REASONING",
        "copa": "lorafa.data.sets.copa:COPA",
        "emo": "lorafa.data.sets.emo:EMO",
        "flan": "lorafa.data.sets.flan:FLAN",
        "flan_v2": "lorafa.data.sets.flan_v2:FLAN_V2",
        "gsm8k": "lorafa.data.sets.gsm8k:GSM8K",
        "meta_math": "lorafa.data.sets.meta_math:META_MATH",
        "meta_math_full": "lorafa.data.sets.meta_math_full:META_MATH_FULL",
        "mnli": "lorafa.data.sets.mnli:MNLI",
        "mrpc": "lorafa.data.sets.mrpc:MRPC",
        "qnli": "lorafa.data.sets.qnli:QNLI",
        "qqp": "lorafa.data.sets.qqp:QQP",
        "rte": "lorafa.data.sets.rte:RTE",
        "squad": "lorafa.data.sets.squad:SQUAD",
        "sst2": "lorafa.data.sets.sst2:SST2",
        "wic": "lorafa.data.sets.wic:WIC",
        "wizard_lm": "lorafa.data.sets.wizard_lm:WIZARD_LM",
        "word_problems": "lorafa.data.sets.word_problems:WORD_PROBLEMS",
        "file": "lorafa.data.files:FILE",
        "hub": "lorafa.data.hub:HUB",
    },
)

TEMPLATES: Registry[ChatTemplate] = Registry(
    "chat template",
    {
        "alpaca": "lorafa.data.templates:ALPACA",
        "chatml": "lorafa.data.templates:CHATML",
        "plain": "lorafa.data.templates:PLAIN",
        "spaced": "lorafa.data.templates:SPACED",
        "vicuna": "lorafa.data.templates:VICUNA",
    },
)
"""Chat templates that ``data.template`` takes by name."""


def data_set_names() -> list[str]:
    """Data sets that have a name of their own; others are named by a path or a Hub id."""
    return [name for name in DATASETS.names() if DATASETS.get(name).takes is None]


def data_set_of(name: str) -> DataSet | None:
    """What loads the data set of a name, a path or a Hub id; None where that is none of them."""
    if name in data_set_names():
        return DATASETS.get(name)
    sources = map(DATASETS.get, DATASETS.names())
    return next((source for source in sources if source.takes is not None and source.takes(name)), None)
