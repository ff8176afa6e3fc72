"""A kind of model as the runner knows it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from lorafa.data.chat import IGNORE, Sample
from lorafa.data.collate import Collate
from lorafa.data.encoding import Encoding
from lorafa.data.records import Record

RowLosses = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Tensor]]
"""(model, batch with ``labels``) -> the loss of each row, summed over its terms, in nats (rows,) with a gradient, and
the number of its terms (rows,), int64. A term is a label that is not -100: an epoch, a step of accumulated batches and
an evaluation are means over terms."""

NEXT_TOKEN = "next_token"
"""It gives a distribution of the next token of any text."""
TEXT = "text"
"""It writes an answer to a prompt."""
LIKELIHOOD = "likelihood"
"""Its loss is the negative log-likelihood of an answer's tokens."""
CLASSES = "classes"
"""It chooses one of several classes."""

CLASSIFIER = "ForSequenceClassification"
"""How classes of transformers end that have a head of classes."""


class Kind(ABC):
    """A line of ``KINDS``: what is loaded, how a record becomes a sample, samples a batch, and a batch a loss.

    A kind is recognized by the model itself, so that nobody has to be told (:func:`lorafa.models.kinds.found.kind_of`).
    """

    name: ClassVar[str]
    words: ClassVar[str]
    """What a model of it is called: "a causal language model"."""
    auto_class: ClassVar[str]
    """The class of transformers that loads one."""
    task_type: ClassVar[str]
    """What the config of its adapters says."""
    offers: ClassVar[frozenset[str]]
    """What evaluations can ask of one: ``TEXT``, ``CLASSES`` ..."""
    usual_eval: ClassVar[str] = "loss"
    """What is measured where nothing is said and the default of the settings asks what it does not offer."""
    packs: ClassVar[bool] = False
    """Whether several samples can stand in one row."""
    adds_tokens: ClassVar[bool] = False
    """Whether it can be given new tokens."""
    objective: ClassVar[str | None] = None
    """The one objective that trains it, where others cannot."""
    own_template: ClassVar[bool] = False
    """Whether the chat template of its tokenizer writes what it reads; else ``data.template`` alone does."""

    @abstractmethod
    def is_of(self, model: Any) -> bool:
        """Whether a loaded model, without adapters, is of this kind."""

    @abstractmethod
    def is_made_for(self, config: Any) -> bool:
        """Whether a model with this config is taken for one of this kind where nothing is said."""

    @abstractmethod
    def check(self, where: str, model: Any) -> None:
        """Raises SourceError for a model whose numbers would mean nothing."""

    @abstractmethod
    def encoding(self, model: Any) -> Encoding:
        """How records become samples for a model of it, which is loaded."""

    @abstractmethod
    def prompts(self, records: Iterable[Record], tokenizer: Any) -> list[list[int]]:
        """What it reads of each record; raises DataError."""

    @abstractmethod
    def collator(self, pad_id: int) -> Collate:
        """What makes batches of its samples."""

    def row_losses(self) -> RowLosses | None:
        """The loss of each row of a batch; None: of the next tokens, as `lorafa.models.head_loss` computes it."""
        return None

    def classes(self, config: Any, answers: Callable[[], Sequence[str]] | None, where: str) -> tuple[str, ...]:
        """The classes it tells apart, of the answers it is to be trained on or of its config; none of most kinds."""
        return ()

    def classes_in(self, model: Any) -> tuple[str, ...]:
        """The classes that a loaded model tells apart, in the order of its outputs; none of most kinds."""
        return ()

    def loading(self, classes: Sequence[str]) -> dict[str, Any]:
        """What its config is given when it is loaded."""
        return {}

    def settle(self, model: Any, tokenizer: Any) -> None:  # noqa: B027 - most kinds have nothing to tell
        """Tell a model that was just loaded what it has to know of its tokenizer, which has a pad token by now."""

    def may_be_new(self, weight: str, model: Any) -> bool:
        """Whether a weight may start at random where the files lack it: its module is then trained whole."""
        return False

    def keeps_head(self, config: Any, classes: Sequence[str]) -> bool:
        """Whether the output of a checkpoint with this config is one for these classes."""
        return True

    def fullest(self, length: int) -> Sample:
        """A sample that is as long as ``data.max_length`` lets one be, all of it trained that can be."""
        return Sample([0] * length, [IGNORE] + [0] * (length - 1))

    def longest(self, samples: Sequence[Sample]) -> int | None:
        """The most tokens that are read, or written, at once; None: those of a whole sample."""
        return None


def architecture_of(config: Any) -> str:
    """The class of transformers that a checkpoint with this config is of; an empty text where it does not say."""
    return str((getattr(config, "architectures", None) or [""])[0])


def per_row(losses: Tensor, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """Losses of single labels (rows, labels) added up for each row, with the number of those that count."""
    counts = labels != ignored
    return losses.masked_fill(~counts, 0.0).sum(dim=-1), counts.sum(dim=-1)
