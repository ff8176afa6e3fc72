"""WizardLM's evolved instructions, the English ones; answers that decline or speak of an AI are left out."""

from __future__ import annotations

from lorafa.data.cells import Row
from lorafa.data.sets.prompts import answer_of, instructions
from lorafa.data.sets.published import InOrder, Only, Published, PublishedSettings

DECLINING = ("sorry", "as an ai")


def _answers(row: Row, place: str) -> bool:
    answer = (answer_of(row, place, "output") or "").lower()
    return not any(words in answer for words in DECLINING)


WIZARD_LM = Published(
    hub="silk-road/Wizard-LM-Chinese-instruct-evol",
    file="wizard_lm.jsonl",
    columns=("instruction", "output"),
    record=instructions("instruction", "output"),
    heldout=InOrder(trained=52_000, heldout=18_000),
    only=Only(keeps=_answers, called="that answers", having="an 'output' without 'sorry' and 'as an AI'"),
).data_set(settings=PublishedSettings)
