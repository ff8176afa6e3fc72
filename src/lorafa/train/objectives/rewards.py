"""Rewards of answers that a model writes itself: known by name, or a function of the user's."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lorafa.data.numbers import only_number
from lorafa.errors import ConfigError, LoraError, TrainingError, did_you_mean, first_line
from lorafa.registry import Registry


@dataclass(frozen=True)
class Reward:
    """A line of ``REWARDS``: what an answer is worth beside the row's own."""

    score: Callable[[str, str], float]
    """(what the model wrote, the answer of the row) -> the reward."""
    lacks: Callable[[str | None], str | None]
    """(the answer of a row) -> why it cannot be compared with, in words, or None."""


def _same_number(written: str, answer: str) -> float:
    from lorafa.evals.gsm8k import extract_answer

    found = extract_answer(written)
    return float(found is not None and found == extract_answer(f"#### {answer}"))


def _no_number(answer: str | None) -> str | None:
    return None if answer is not None and only_number(answer) is not None else "no final number (#### N)"


GSM8K = Reward(_same_number, _no_number)
"""1 where the final number is that of the row, as `lorafa eval task=gsm8k` reads it, else 0."""
EXACT_MATCH = Reward(
    lambda written, answer: float(written.strip() == answer.strip()), lambda answer: "no answer" if not answer else None
)
"""1 where the answer is that of the row word for word, blanks around it aside, else 0."""
REWARDS: Registry[Reward] = Registry(
    "reward",
    {"exact_match": f"{__name__}:EXACT_MATCH", "gsm8k": f"{__name__}:GSM8K"},
)


class Scorer:
    """A reward as TRL calls it, which says what is wrong with it by its name.

    A function of the user's is called as TRL calls one: with ``prompts`` and ``completions`` (lists of messages each),
    ``completion_ids``, and all columns of the rows (``answer``) by name, and returns a number for each.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.known = REWARDS.get(name) if name in REWARDS else None
        self._function = None if self.known is not None else _of_user(name)
        self.__name__ = name.rpartition(":")[2]  # what TRL calls it in its logs

    def lacks(self, answer: str | None) -> str | None:
        """Why a row with this answer cannot be rewarded; None where it can."""
        return None if self.known is None else self.known.lacks(answer)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """A reward for each completion.

        Raises:
            TrainingError: the function fails, or does not return a finite number for each.
        """
        if self.known is not None:
            texts = [completion[-1]["content"] for completion in completions]
            return [self.known.score(text, answer) for text, answer in zip(texts, columns["answer"], strict=True)]
        assert self._function is not None
        try:
            found = self._function(prompts=prompts, completions=completions, **columns)
        except LoraError:
            raise
        except Exception as error:
            raise TrainingError(
                f"The reward {self.name} failed on {len(completions)} answers: {type(error).__name__}: "
                f"{first_line(error)}. It is called with prompts, completions, completion_ids and the columns of the "
                "rows by name (answer): let it take them, and others (**columns)."
            ) from error
        return self._checked(found, len(completions))

    def _checked(self, found: Any, count: int) -> list[float]:
        values = list(found.tolist() if hasattr(found, "tolist") else found) if _is_listed(found) else None
        if values is None or len(values) != count:
            what = type(found).__name__ if values is None else f"{len(values)} values"
            raise TrainingError(
                f"The reward {self.name} returned {what} for {count} answers. Return a list with a number for each."
            )
        for number, value in enumerate(values, 1):
            if isinstance(value, str) or value is None or not math.isfinite(value):
                raise TrainingError(
                    f"The reward {self.name} returned {value!r} for answer {number} of {count}. Return a finite number "
                    "for each, 0 for one that cannot be judged."
                )
        return [float(value) for value in values]


def scorers(names: str | Sequence[str]) -> list[Scorer]:
    """The rewards of these names.

    Raises:
        ConfigError: there is no such reward.
    """
    return [Scorer(name) for name in ([names] if isinstance(names, str) else names)]


def _is_listed(found: Any) -> bool:
    return isinstance(found, list | tuple) or hasattr(found, "tolist")


def _of_user(name: str) -> Callable[..., Any]:
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigError(
            f"Unknown reward {name!r}.{did_you_mean(name, REWARDS.names())} Known: {', '.join(REWARDS.names())}; a "
            "function of your own is named module:function."
        )
    try:
        with _beside_the_user():
            found = getattr(import_module(module), function, None)
    except ImportError as error:
        raise ConfigError(
            f"objective.reward={name}: the module {module!r} cannot be imported: {first_line(error)}. It is looked for "
            "in the current folder and among installed packages."
        ) from error
    except Exception as error:
        raise ConfigError(
            f"objective.reward={name}: the module {module!r} fails when it is imported: {type(error).__name__}: "
            f"{first_line(error)}."
        ) from error
    if not callable(found):
        own = [key for key, value in vars(sys.modules[module]).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(
            f"objective.reward={name}: {module!r} has no function {function!r}.{did_you_mean(function, own)}"
        )
    return found  # type: ignore[no-any-return]


@contextmanager
def _beside_the_user() -> Iterator[None]:
    """Modules of the current folder can be imported inside the block, as in `python -m`."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
