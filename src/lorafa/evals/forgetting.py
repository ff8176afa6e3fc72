"""How far a model has moved from its base: KL(base || model) in nats a token, on text that the base itself writes.

The mean over texts that are drawn from the base estimates the divergence of the two distributions over texts, so no
corpus is needed (Kullback and Leibler 1951); at each token it is taken over the whole vocabulary, not over the one
token that was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafa.backends.offload import device_of
from lorafa.data.chat import IGNORE, WHOLE, Sample, encode_all
from lorafa.data.collate import Collator
from lorafa.errors import ConfigError, DataError
from lorafa.evals.benchmark import asks_nothing
from lorafa.evals.by_length import Progress, by_length
from lorafa.evals.drawn import Drawing, Opening, check_drawing, drawn_texts, openings
from lorafa.evals.entry import Evaluation, Measured, Scores, Source, Subject
from lorafa.evals.paired import mean_interval
from lorafa.evals.perplexity import PERPLEXITY, PerplexitySettings, first_window, pieces
from lorafa.models.head_loss import CHUNK_BYTES, HiddenStates, supervised_nll, supports_chunked_loss
from lorafa.models.load import load_model, on_accelerator
from lorafa.models.modes import evaluating
from lorafa.models.positions import Positions, from_all_logits
from lorafa.settings.checks import check_int


@dataclass(frozen=True, kw_only=True)
class ForgettingSettings(PerplexitySettings):
    """Which texts the base writes, or how given ones are cut."""

    texts: int = 64
    """Texts that the base writes: the empty prompt and short questions begin them by turns."""
    max_new_tokens: int = 64
    """Longest of these texts, in tokens."""
    seed: int = 0
    """Seed of the texts."""
    base: str | None = None
    """Model to compare with, a folder or a Hub id; null is the model without its adapters."""
    trust_remote_code: bool = False
    """Run code that comes with that model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("eval.texts", self.texts, at_least=1)
        check_int("eval.max_new_tokens", self.max_new_tokens, at_least=1)
        check_int("eval.seed", self.seed, at_least=0)
        if self.trust_remote_code and self.base is None:
            raise ConfigError("eval.trust_remote_code=true would change nothing: there is no eval.base. Drop it.")

    def drawing(self) -> Drawing:
        """How the texts are drawn."""
        return Drawing(self.max_new_tokens, self.seed)


# ---- the divergence


def divergence(base_logits: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(base_logits) || softmax(logits)) of each row, in nats; both (rows, vocabulary), the result (rows,).

    The terms are q - p - p log(q/p), which add up to the same as p log(p/q) because p and q add up to one. Each is
    nonnegative by itself, so that rounding does not drown a small divergence, and equal logits give exactly 0.
    """
    log_p, log_q = base_logits.log_softmax(-1), logits.log_softmax(-1)
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_q - log_p
    near = p * (log_ratio.clamp(-1, 1).expm1() - log_ratio)
    terms = torch.where(log_ratio.abs() < 1, near, q - p - p * log_ratio)
    return torch.where(p == 0, q, terms).sum(-1)  # where p is 0 the logarithm may be infinite, and counts for nothing


class _Compared:
    """The divergence from what another model has at the same positions, a chunk of rows at a time."""

    layers: tuple[int, ...] = ()
    found: Tensor

    def __init__(self, base: Positions) -> None:
        self._base = base

    def __call__(self, states: HiddenStates, targets: Tensor, chunk_tokens: int | None) -> tuple[Tensor, int]:
        own = Positions()
        zero, count = own(states, targets, chunk_tokens)
        at_once = chunk_tokens or _fitting(own.head.weight.shape[0])
        chunks = [slice(first, first + at_once) for first in range(0, count, at_once)]
        self.found = torch.cat([divergence(self._base.logits(chunk), own.logits(chunk)) for chunk in chunks])
        return zero, count


class Pair:
    """A model and its base: the same model without its adapters, or another one."""

    def __init__(self, model: Any, base: Any = None) -> None:
        self.model = model
        self._base = base

    @contextmanager
    def as_base(self) -> Iterator[Any]:
        """The base, for the length of a with-block."""
        if self._base is not None:
            with evaluating(self._base):
                yield self._base
            return
        with self.model.disable_adapter():
            yield self.model

    def divergences(
        self,
        samples: Sequence[Sample],
        pad: int,
        batch_size: int,
        progress: Progress | None = None,
        chunk_tokens: int | None = None,
    ) -> list[float]:
        """The divergence of each sample, summed over its labelled tokens but the first of all, in nats.

        Args:
            pad: id that fills up the rows of a batch.
            chunk_tokens: positions whose logits are there at once; by default as many as ``CHUNK_BYTES`` hold.
        """
        rows = [number for number, one in enumerate(samples) if _counted(one)]
        with evaluating(self.model), self.as_base() as base:
            chunked = supports_chunked_loss(base) is None
        chunked = chunked and supports_chunked_loss(self.model) is None
        at_once = batch_size if chunked else 1  # all logits of one text at a time
        collator, device = Collator(pad), device_of(self.model)

        def of_batch(numbers: list[int]) -> list[float]:
            chosen = [samples[rows[number]] for number in numbers]
            batch = {name: tensor.to(device) for name, tensor in collator(chosen).items()}
            found = self._chunked(batch, chunk_tokens) if chunked else self._whole(batch, chunk_tokens)
            counts = [_counted(sample) for sample in chosen]
            return [float(part.sum()) for part in torch.split(found.double().cpu(), counts)]

        with evaluating(self.model):
            sums = by_length(of_batch, [len(samples[number].input_ids) for number in rows], at_once, progress)
        of_sample = dict(zip(rows, sums, strict=True))
        return [of_sample.get(number, 0.0) for number in range(len(samples))]

    def _chunked(self, batch: dict[str, Tensor], chunk_tokens: int | None) -> Tensor:
        kept = Positions()
        with self.as_base() as base:
            supervised_nll(base, batch, objective=kept)
        compared = _Compared(kept)
        supervised_nll(self.model, batch, chunk_tokens, compared)
        return compared.found

    def _whole(self, batch: dict[str, Tensor], chunk_tokens: int | None) -> Tensor:
        """The same where the model cannot be cut before its head."""
        with self.as_base() as base:
            base_logits = from_all_logits(base, batch)
        logits = from_all_logits(self.model, batch)
        wide = torch.promote_types(logits.dtype, torch.float32)
        at_once = chunk_tokens or _fitting(logits.shape[-1])
        pairs = zip(torch.split(base_logits, at_once), torch.split(logits, at_once), strict=True)
        return torch.cat([divergence(one.to(wide), other.to(wide)) for one, other in pairs])


def _fitting(vocabulary: int) -> int:
    """Positions whose logits ``CHUNK_BYTES`` hold in float32."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def _counted(sample: Sample) -> int:
    return sum(label != IGNORE for label in sample.labels[1:])


# ---- the evaluation


def _pair(subject: Subject, settings: ForgettingSettings) -> Pair:
    if settings.base is None:
        return Pair(subject.model)
    base, tokenizer = load_model(
        settings.base, subject.model.dtype, trust_remote_code=settings.trust_remote_code
    )
    if tokenizer.get_vocab() != subject.tokenizer.get_vocab():
        raise ConfigError(
            f"eval.base={settings.base} has another vocabulary than the model, so their distributions cannot be "
            "compared. Name the model it was trained from."
        )
    return Pair(subject.model, on_accelerator(base))


def _samples(
    subject: Subject, pair: Pair, items: Sequence[Any], settings: ForgettingSettings, progress: Progress
) -> list[tuple[int, Sample]]:
    """(number of the item, a piece of its text)."""
    if isinstance(items[0], Opening):
        with pair.as_base() as base:  # the base's own weights decide which file the texts are in
            begun, how = list(items), settings.drawing()
            return list(enumerate(drawn_texts(base, subject.tokenizer, begun, how, progress)))
    window, overlap = settings.reading(subject.model)
    samples = encode_all(items, subject.tokenizer, WHOLE).samples
    return [
        (number, piece)
        for number, (record, sample) in enumerate(zip(items, samples, strict=True))
        for piece in (pieces(sample, window, overlap) if record.plain else [first_window(sample, window)])
    ]


def _measure(
    subject: Subject, items: Sequence[Any], settings: ForgettingSettings, batch_size: int, progress: Progress
) -> Scores:
    pair = _pair(subject, settings)
    samples = _samples(subject, pair, items, settings, progress)
    sums, tokens = [0.0] * len(items), [0] * len(items)
    found = pair.divergences([one for _, one in samples], subject.tokenizer.pad_token_id or 0, batch_size, progress)
    for (number, sample), nats in zip(samples, found, strict=True):
        sums[number] += nats
        tokens[number] += _counted(sample)
    if not sum(tokens):
        raise DataError("The texts have no token to count, so there is no divergence. Give longer ones: data=<file>.")
    values = [nats / count if count else 0.0 for nats, count in zip(sums, tokens, strict=True)]
    measured = Measured("kl", values, list(map(float, tokens)), higher_is_better=False)
    mean, low, high = mean_interval(measured)
    numbers: dict[str, Any] = {"kl": mean, "tokens": sum(tokens), "texts": len(items)}
    if math.isfinite(low) and math.isfinite(high):
        numbers["interval"] = (low, high)
    return Scores(f"KL to the base {mean:.5f} nats a token ({sum(tokens):,} tokens)", numbers, measured=measured)


def _check(subject: Subject, items: Sequence[Any], settings: ForgettingSettings) -> None:
    if not items:
        raise ConfigError(
            "eval=forgetting asks nothing of a run's held-out rows. To measure it after a training give "
            "eval.forgetting=true."
        )
    if settings.base is None and not hasattr(subject.model, "disable_adapter"):
        raise ConfigError(
            "There is no base to compare with: task=forgetting measures adapters, and this model has none. Name the "
            "model it was trained from: eval.base=<model>."
        )
    biases = [name for name, one in getattr(subject.model, "peft_config", {}).items() if one.bias != "none"]
    if settings.base is None and biases:
        raise ConfigError(
            f"The adapter {biases[0]!r} has trained biases of the base itself, which are there without it too, so "
            "there is no base to compare with here. Name the model it was trained from: eval.base=<model>."
        )
    if isinstance(items[0], Opening):
        check_drawing(subject.model, subject.tokenizer, items, settings.drawing())


def _read(source: Source, settings: ForgettingSettings) -> list[Any]:
    if source.name is None:
        return list(openings(settings.texts))
    assert PERPLEXITY.read is not None
    return PERPLEXITY.read(source, settings)


def check_forgetting(model: Any, tokenizer: Any) -> None:
    """Raises DataError where :func:`forgetting` could not draw its texts, before any training."""
    settings = ForgettingSettings()
    check_drawing(model, tokenizer, openings(settings.texts), settings.drawing())


def forgetting(subject: Subject, batch_size: int, progress: Progress) -> Scores:
    """How far a model with adapters has moved from its base, on texts that the base writes.

    Raises:
        DataError: nothing can be drawn from this base.
    """
    settings = ForgettingSettings()
    return _measure(subject, openings(settings.texts), settings, batch_size, progress)


FORGETTING = Evaluation(
    asks=asks_nothing, of_run=False, check=_check, measure=_measure, read=_read, settings=ForgettingSettings
)  # fmt: skip
"""How far a model has moved from its base: KL(base || model) in nats a token, on text that the base itself writes."""
