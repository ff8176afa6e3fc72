"""Layers that the model passes by: their weight is read by other code, and they are never called.

An adapter on one of these would do nothing, in silence. It is made to act through the weight where that is exact;
otherwise the target is refused, with what to target instead. What is not known here is found at the first backward
pass, by :func:`lorafa.check_gradients`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import unwrap
from types import CellType, CodeType, FunctionType

from torch import nn

from lorafa.backends.embedding import is_table
from lorafa.surgery.walk import Parents, Place, pristine_of, tied_groups


@dataclass(frozen=True)
class Reader:
    """What a class does with the weights of layers it holds."""

    reads: tuple[str, ...] = ()
    """It multiplies by their weights itself, always or at times: an adapter there acts through the weight."""
    passes_by: tuple[str, ...] = ()
    """It hands their weights to a kernel that knows no adapter: these are refused."""
    why: str = "a kernel takes its weight"
    instead: str = ""
    """What to target in place of those that are passed by; ``{owner}`` is the name of the module that holds them."""
    drops: bool = False
    """Whether ``reads`` are called in training, so that ``lora_dropout`` acts there."""


_SCAN = "a kernel takes its weight, one filter a channel, which has no room for an update"
_PROJECTIONS = "Target the projections beside it, or leave it out."
_CONV = Reader(passes_by=("conv1d",), why=_SCAN, instead=_PROJECTIONS)
_SHORT_CONV = Reader(passes_by=("conv",), why=_SCAN, instead=_PROJECTIONS)
_POSITIONS = Reader(passes_by=("rel_embeddings",), why="the encoder takes its rows itself", instead="Leave it out.")
_MAMBA = Reader(("x_proj", "dt_proj", "out_proj"), ("conv1d",), _SCAN, _PROJECTIONS)
_MAMBA2 = Reader(("out_proj",), ("conv1d",), _SCAN, _PROJECTIONS)

READERS: dict[str, Reader] = {
    "torch.nn.modules.activation.MultiheadAttention": Reader(
        ("out_proj",),
        ("out_proj",),
        "nn.MultiheadAttention reads its weight",
        "Target {owner!r} instead; its out_proj gets an adapter too.",
    ),
    # In evaluation, by a fused kernel.
    "torch.nn.modules.transformer.TransformerEncoderLayer": Reader(("linear1", "linear2"), drops=True),
    "WavLMAttention": Reader(("q_proj", "k_proj", "v_proj", "out_proj")),
    "LongcatFlashTopkRouter": Reader(("classifier",)),
    **dict.fromkeys(("DebertaEncoder", "DebertaV2Encoder"), _POSITIONS),
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), _MAMBA),
    **dict.fromkeys(("JambaMambaMixer",), Reader(("dt_proj",), ("conv1d",), _SCAN, _PROJECTIONS)),
    **dict.fromkeys(
        (
            "Mamba2Mixer", "BambaMixer", "FalconH1Mixer", "GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer",
            "Zamba2MambaMixer",
        ),
        _MAMBA2,
    ),
    **dict.fromkeys(
        (
            "ZambaMambaMixer", "BailingHybridDeltaAttention", "Glm5NextTextLinearAttention", "KimiLinearDeltaAttention",
            "OlmoHybridGatedDeltaNet", "Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet",
        ),
        _CONV,
    ),
    **dict.fromkeys(("Lfm2ShortConv", "Lfm2MoeShortConv"), _SHORT_CONV),
    "RecurrentGemmaRecurrentBlock": Reader(passes_by=("conv_1d",), why=_SCAN, instead=_PROJECTIONS),  # when generating
}  # fmt: skip
"""A class, by its full name or (of those that are copied between files) by its last, -> what it does with its layers.
It is looked up along the bases of a module's class. A further architecture is a further line."""


def reader_of(module: nn.Module) -> Reader | None:
    """What the class of a module, or one of its bases, does with the layers it holds."""
    names = (name for cls in type(module).__mro__ for name in (f"{cls.__module__}.{cls.__qualname__}", cls.__name__))
    return next((READERS[name] for name in names if name in READERS), None)


def weight_is_read(module: nn.Module, parents: Parents) -> bool:
    """Whether a module that holds ``module`` may multiply by its weight instead of calling it."""
    readers = ((reader_of(parent), name) for parent, name in parents.of(module))
    return any(reader is not None and name in reader.reads for reader, name in readers)


class Bypassed:
    """Why an adapter on a module of a model would do nothing."""

    def __init__(self, model: nn.Module, everything: Sequence[Place]) -> None:
        self._holders = {"": model} | {place.name: pristine_of(place.module) for place in everything}
        self._everything = everything

    @cached_property
    def _shared(self) -> dict[int, list[Place]]:
        """Identity of a module -> the modules that share its weight, it among them."""
        return {id(place.module): group for group in tied_groups(self._everything) for place in group}

    def reads(self, name: str) -> bool:
        """Whether the weight of a module may be multiplied by in training too, so that nothing drops its inputs."""
        reader = self._reader(name)
        return reader is not None and name.rpartition(".")[2] in reader.reads and not reader.drops

    def why(self, place: Place) -> str | None:
        """The reason and the remedy, as the sentences of an error; None for a layer that is called or read."""
        return self.passed_by(place) or self.hands_out(place)

    def passed_by(self, place: Place) -> str | None:
        """:meth:`why` of a layer whose weight is handed to what knows no adapter."""
        owner, _, name = place.name.rpartition(".")
        reader = self._reader(place.name)
        if reader is None or name not in reader.passes_by:
            return None
        return (
            f"{place.name!r} is never called: {reader.why}, so an adapter on it would do nothing. "
            f"{reader.instead.format(owner=owner)}"
        )

    def hands_out(self, place: Place) -> str | None:
        """:meth:`why` of a table that is there for others to share; none if these are trained with it."""
        others = self._sharers(place)
        if not others:
            return None
        return (
            f"{place.name!r} is never called: it only holds the weight that it shares with "
            f"{' and '.join(map(repr, others))}, so training it would do nothing. Name those instead, or set "
            "ensure_weight_tying=True, which trains all of them as one."
        )

    def _reader(self, name: str) -> Reader | None:
        return reader_of(self._holders[name.rpartition(".")[0]])

    def _sharers(self, place: Place) -> list[str]:
        """The modules that have the table of an embedding that the code of its owners never names, or nothing.

        Encoder-decoders have one that ties are made from (``shared`` in T5 and BART): their two halves call their own.
        """
        if not is_table(pristine_of(place.module)):
            return []
        others = [p for p in self._shared.get(id(place.module), ()) if p.module is not place.module]
        if not any(is_table(pristine_of(p.module)) for p in others):
            return []
        owner, _, name = place.name.rpartition(".")
        classes = [type(self._holders[owner])]
        while owner:
            owner = owner.rpartition(".")[0]
            classes.append(type(self._holders[owner]))
        return [] if _may_call(classes, name) else [p.name for p in others]


_CHILDREN = frozenset({"children", "named_children", "modules", "named_modules", "_modules"})
_NOT_RUN = frozenset({
    "__init__", "_init_weights", "get_input_embeddings", "set_input_embeddings", "get_output_embeddings",
    "set_output_embeddings", "tie_weights", "_tie_weights", "resize_token_embeddings",
})  # fmt: skip
"""Methods that name an embedding without running it."""


def _may_call(classes: Sequence[type], name: str) -> bool:
    """Whether code may call the child ``name`` of an instance of the first class; the others are of its owners.

    Yes where that class has no ``forward`` in Python, or one that goes through its children.
    """
    words = [words_of(cls) for cls in classes]
    forward = words[0].get("forward")
    if forward is None or not name.isidentifier() or _CHILDREN & forward:
        return True
    return any(name in used for by_method in words for used in by_method.values())


def words_of(cls: type) -> dict[str, set[str]]:
    """Name of a method -> the names and texts in its code, for those that may run a child."""
    found: dict[str, set[str]] = {}
    for base in cls.__mro__:
        for key, function in vars(base).items() if base is not nn.Module else ():
            if isinstance(function, FunctionType) and key not in _NOT_RUN:
                found.setdefault(key, set()).update(word for code in _codes(function, set()) for word in _words(code))
    return found


def _codes(function: FunctionType, seen: set[int]) -> Iterator[CodeType]:
    """The code of a function and of those that it wraps."""
    if id(function) in seen:
        return
    seen.add(id(function))
    yield function.__code__
    held = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    for inner in (unwrap(function), *held):
        if isinstance(inner, FunctionType):
            yield from _codes(inner, seen)


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)
        elif isinstance(constant, str):
            yield constant
