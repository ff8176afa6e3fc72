"""Models without their weights: built from a config alone, on the meta device, where a tensor is only its shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorafa.errors import SourceError
from lorafa.models import MODELS
from lorafa.models.kinds import AUTO, KINDS
from lorafa.models.kinds.entry import Kind
from lorafa.models.kinds.found import kind_named
from lorafa.models.load import drawn_anew, modules_of, resolve_model
from lorafa.models.sourced import as_source_error


@dataclass(frozen=True)
class Outline:
    """A model without its weights, and what a run would make of it."""

    model: Any
    """On the meta device."""
    kind: Kind
    new: tuple[str, ...]
    """Modules that would start at random, and would be trained whole."""
    classes_known: bool
    """Whether its head is one for the classes of the run; False: nothing says how many there are, as many as the config
    of transformers has by default are taken."""

    def remarks(self) -> list[str]:
        """What is to be said of it: what is new in it, and how many classes were taken where none are known."""
        found = []
        if self.new:
            found.append(f"New in {self.kind.words}, and trained whole: {', '.join(self.new)}.")
        if not self.classes_known:
            found.append(
                f"Nothing says which classes {self.kind.words} is to tell apart: {self.model.config.num_labels} are "
                "counted."
            )
        return found


def shape_model(
    name: str,
    dtype: torch.dtype | None = None,
    *,
    cache_dir: Path | None = None,
    revision: str | None = None,
    kind: str = AUTO,
    trust_remote_code: bool = False,
) -> Any:
    """A language model on the meta device: every layer is there, no number is. See :func:`outline`."""
    found = outline(
        name, dtype, cache_dir=cache_dir, revision=revision, kind=kind, trust_remote_code=trust_remote_code
    )
    return found.model


def outline(
    name: str,
    dtype: torch.dtype | None = None,
    *,
    cache_dir: Path | None = None,
    revision: str | None = None,
    kind: str = AUTO,
    answers: Callable[[], Sequence[str]] | None = None,
    classes: Sequence[str] | None = None,
    stored: Mapping[str, tuple[int, ...]] | None = None,
    trust_remote_code: bool = False,
) -> Outline:
    """A model on the meta device, as a run would have it before any weight is loaded.

    Args:
        name: a line of ``MODELS`` (which wins over a folder of that name), a local folder with a config.json, or a Hub
            id, of which only the config is fetched.
        dtype: of the weights; None takes the config's, float32 where it has none.
        cache_dir, revision: as in :func:`~lorafa.models.load.resolve_model`.
        kind: a line of ``KINDS``, or "auto" for the one its config speaks of.
        answers, classes: as in :func:`~lorafa.models.load.load`; with neither, classes are those of the config.
        stored: the shapes of the weights in its files; None goes by the class of model that the config names.
        trust_remote_code: as in :func:`~lorafa.models.load.load_model`.

    Raises:
        DataError: the answers are no classes.
        SourceError: there is no such model, its config cannot be read, or it is not one of such a model; or it needs
            code of its own, which is not trusted.
    """
    known = MODELS.get(name).shape if name in MODELS and revision is None else None
    try:
        place = name if known else resolve_model(name, cache_dir=cache_dir, revision=revision)
    except SourceError as error:
        raise SourceError(f"{error} Shapes known by name: {', '.join(MODELS.names())}.") from error
    import transformers

    step = f"give model=<local folder with config.json>, a Hub id, or one of: {', '.join(MODELS.names())}."
    words = "a model" if kind == AUTO else KINDS.get(kind).words
    with as_source_error(f"Could not make {words} from the config of {name!r}", step):
        found = transformers.AutoConfig
        config = found.for_model(**known) if known else found.from_pretrained(
            place, revision=revision, trust_remote_code=trust_remote_code
        )
    entry = kind_named(kind, config)
    known_classes = _classes(entry, config, answers, name) if classes is None else tuple(classes)
    keeps_head = known_classes is None or entry.keeps_head(config, known_classes)
    for key, value in entry.loading(known_classes or ()).items() if known_classes else ():
        setattr(config, key, value)
    with as_source_error(f"Could not make {entry.words} from the config of {name!r}", step):
        own = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            model: Any = getattr(transformers, entry.auto_class).from_config(
                config, dtype=dtype or own, trust_remote_code=trust_remote_code
            )
    new = set(modules_of(_lacking(model, entry, stored), model))
    if not keeps_head:
        new |= {path.partition(".")[0] for path in drawn_anew(model)}
    return Outline(model, entry, tuple(sorted(new)), known_classes is not None)


def _classes(
    kind: Kind, config: Any, answers: Callable[[], Sequence[str]] | None, name: str
) -> tuple[str, ...] | None:
    """The classes that a run would train; None where nothing says which."""
    try:
        return kind.classes(config, answers, repr(name))
    except SourceError:
        return None


def _lacking(model: Any, kind: Kind, stored: Mapping[str, tuple[int, ...]] | None) -> list[str]:
    """The weights that the files lack or have in another shape, of those that the kind lets start at random."""
    body, names = f"{model.base_model_prefix}.", model.state_dict()
    may_be = [name for name in names if kind.may_be_new(name, model)]
    if stored is None:
        headed = (getattr(model.config, "architectures", None) or [""])[0] == type(model).__name__
        return [name for name in may_be if not headed and not name.startswith(body)]
    found = {name: stored.get(name, stored.get(name.removeprefix(body))) for name in may_be}
    return [name for name, shape in found.items() if shape != tuple(names[name].shape)]
