"""What a run will take of memory at its peak, by component, before any weight is loaded."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lorafa.config import LoraConfig
from lorafa.costs.accounting import AdapterCost, put_on
from lorafa.costs.batches import Batches
from lorafa.costs.course import Course, course_of
from lorafa.costs.heap import heap_peak
from lorafa.costs.room import resident_bytes
from lorafa.costs.teaching import copied_bytes, model_of
from lorafa.data.classes import classes_beside
from lorafa.errors import LoraError, first_line
from lorafa.models import MODELS
from lorafa.models.attention import use_blocks
from lorafa.models.kinds.entry import NEXT_TOKEN, Kind
from lorafa.models.load import DTYPES, resolve_model
from lorafa.models.shapes import Outline, outline
from lorafa.optimizers.state_bytes import Sizes
from lorafa.storage.headers import StoredWeights, stored_weights
from lorafa.storage.paths import user_path
from lorafa.storage.whole import read_json
from lorafa.surgery.walk import base_parameters
from lorafa.train.adapter_config import lora_config
from lorafa.train.base_model import cache_of, with_kind_of
from lorafa.train.coverage import CoverageRow, coverage
from lorafa.train.settings.model import ModelConfig
from lorafa.train.settings.optim import entry_of
from lorafa.train.settings.run import RunConfig

FORMATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Number formats of safetensors files that a model can be loaded in."""


@dataclass(frozen=True)
class Shape:
    """A model before its weights: its layers, and what the headers of its files say."""

    outline: Outline
    """Its model is in the number format it would be loaded in."""
    stored: StoredWeights | None
    """None where there are no safetensors files to be read."""
    quantized: bool

    @property
    def model(self) -> Any:
        """It is on the meta device."""
        return self.outline.model

    @property
    def kind(self) -> Kind:
        """What kind of model it is."""
        return self.outline.kind

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in {id(p): p for _, p in base_parameters(self.model)}.values())

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights in memory: as stored where they are quantized, by shape and format otherwise."""
        if self.quantized and self.stored is not None:
            return self.stored.bytes
        return tensor_bytes(self.model)

    @property
    def loading_bytes(self) -> int:
        """Bytes while they are loaded: files that are converted are in memory beside what they become."""
        stored = self.stored
        if self.quantized or (stored is not None and FORMATS.get(stored.main_dtype) == self.model.dtype):
            return self.loaded_bytes
        return self.loaded_bytes + (stored.bytes if stored is not None else 0)


@dataclass(frozen=True)
class Memory:
    """Bytes of a run at its peak. The fields add up to it."""

    process: int
    """Python, PyTorch, transformers, the tokenizer and the rows: what this process has, which has loaded them too."""
    weights: int
    """The base model."""
    adapter: int
    """Its parameters; with peft.full what float32 weights take beyond those that are loaded."""
    state: int
    """What the optimizer keeps."""
    activations: int
    """Kept by the forward pass for the backward pass."""
    gradients: int
    """Gradients that are there at the peak."""
    workspace: int
    """Gone again soon: inside of the largest layer, or of the output head with its logits."""
    evaluation: int
    """What an evaluation takes beyond a training step."""
    gaps: int
    """Freed memory that the allocator cannot use again; counted for glibc on a CPU."""
    loading: int
    """What loading takes beyond all this."""
    teacher: int = 0
    """The weights of another model that teaches, and the states of the student that are kept."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Counted:
    """A run as it is known before it is started."""

    memory: Memory
    adapter: AdapterCost | None
    """None where all weights are trained."""
    course: Course | None
    """An evaluation and a step; None where they are not counted."""
    uncounted: str | None
    """Why they are not counted; None where they are."""

    @property
    def own_loss(self) -> str | None:
        """Why the model's own loss is counted; None where the chunked one is."""
        return None if self.course is None else self.course.own_loss


_ANY_PAD = SimpleNamespace(pad_token_id=0)
"""A tokenizer where there is none: which token pads changes no size."""


def shape_of(
    settings: ModelConfig, adapter: str | None = None, answers: Callable[[], Sequence[str]] | None = None
) -> Shape:
    """The model of a run from its config and the headers of its weights.

    Args:
        adapter: one that the run goes on with; it says which kind of model it is for, and which classes it has.
        answers: those of the training rows, for a kind of model that chooses among them; None: they are not known.

    Raises:
        DataError: the answers are no classes.
        SourceError: there is no such model, its config cannot be used, or a shard is missing.
        CheckpointError: a file of weights is damaged.
    """
    place: str | Path | None = None
    if settings.name not in MODELS or MODELS.get(settings.name).fetch is not None:
        place = resolve_model(settings.name, cache_dir=cache_of(settings), revision=settings.revision)
    stored = None if place is None else stored_weights(place)
    dtype = DTYPES.get(settings.dtype)
    if dtype is None and isinstance(place, Path) and stored is not None:
        dtype = _dtype_of_folder(place, stored)
    found = outline(
        settings.name,
        dtype,
        cache_dir=cache_of(settings),
        revision=settings.revision,
        kind=with_kind_of(settings, adapter).kind,
        answers=answers,
        classes=None if adapter is None else classes_beside(adapter),
        stored=None if stored is None else stored.shapes,
        trust_remote_code=settings.trust_remote_code,
    )
    model: Any = found.model
    if settings.attention != "auto":
        model.set_attn_implementation(settings.attention)
    elif NEXT_TOKEN in found.kind.offers:
        use_blocks(model)
    found.kind.settle(model, _ANY_PAD)
    quantized = bool(getattr(model.config, "quantization_config", None))
    return Shape(found, stored, quantized)


def teacher_of(config: RunConfig) -> Shape | None:
    """The model that teaches in a run; None where the teacher is made of the student, or there is none.

    Raises:
        LoraError: as :func:`shape_of`.
    """
    settings = model_of(config.align)
    return None if settings is None else shape_of(settings)


def adapter_of(shape: Shape, config: RunConfig) -> LoraConfig:
    """The adapter that a run trains: that of its settings, or the one that it goes on with.

    Raises:
        LoraError: the settings are wrong, or there is no such adapter.
    """
    if config.peft.adapter is not None:
        return LoraConfig.from_pretrained(user_path(config.peft.adapter))
    return lora_config(config, shape.model, kind=shape.kind, new_modules=shape.outline.new)


def count(
    shape: Shape,
    config: RunConfig,
    batches: Batches | None,
    done: Callable[[int, int], None] = lambda *_: None,
) -> Counted:
    """Count what a run takes.

    Args:
        batches: None leaves out what a batch takes: the least that the run needs.
        done: told how many parts of the count are done, and how many there are.

    Raises:
        LoraError: the adapter does not go with the model.
    """
    process = resident_bytes() or 0  # before anything of the plan's own is made
    teacher = teacher_of(config)
    if config.peft.full:
        return _counted_in_full(shape, config, batches, process, done, teacher)
    model = shape.model
    base, made = tensor_bytes(model), adapter_of(shape, config)
    with put_on(model, made, config.optim) as counted:
        cost = counted()
        course, uncounted = _course(shape, config, batches, done, teacher)
        adapter = tensor_bytes(model) - base
    if made.start.initializer.moves_base and made.start.initializer.variant is None:
        adapter *= 2  # frozen copies of A and B, to be taken out of the base
    state = cost.state_bytes if batches is None or batches.steps != 1 else 0
    kept = copied_bytes(config.align, cost.gradient_bytes, state)
    return Counted(_memory(shape, process, adapter, state, course, teacher, kept), cost, course, uncounted)


def covered(shape: Shape, config: RunConfig) -> list[CoverageRow]:
    """Which modules an adapter matches; nothing where all weights are trained.

    Raises:
        LoraError: the adapter does not go with the model.
    """
    if config.peft.full:
        return []
    with put_on(shape.model, adapter_of(shape, config), config.optim):
        return coverage(shape.model)


def _counted_in_full(
    shape: Shape,
    config: RunConfig,
    batches: Batches | None,
    process: int,
    done: Callable[[int, int], None],
    teacher: Shape | None,
) -> Counted:
    """A training of all weights: they are in float32 then, as their moments are."""
    model = shape.model
    trained = [p for p in model.parameters() if p.is_floating_point()]
    wide = sum(4 * p.numel() for p in trained)
    for parameter in trained:
        parameter.requires_grad_(True)
    course, uncounted = _course(shape, config, batches, done, teacher)
    one_step = batches is not None and batches.steps == 1
    as_stored = entry_of(config.optim).state(Sizes(trained), config.optim.own)
    state = 0 if one_step else as_stored * wide // max(1, sum(p.numel() * p.element_size() for p in trained))
    more = max(0, wide - shape.loaded_bytes)
    kept = copied_bytes(config.align, wide, state)
    return Counted(_memory(shape, process, more, state, course, teacher, kept), None, course, uncounted)


def _course(
    shape: Shape,
    config: RunConfig,
    batches: Batches | None,
    done: Callable[[int, int], None],
    teacher: Shape | None,
) -> tuple[Course | None, str | None]:
    if batches is None:
        return None, "a lower bound was asked for"
    with torch.random.fork_rng(devices=[]):
        try:
            teaching = None if teacher is None else teacher.model
            return course_of(shape.model, config, batches, shape.kind, done, teaching), None
        except LoraError:
            raise
        except Exception as error:  # an architecture may do what cannot be followed without numbers
            return None, f"its code needs numbers ({type(error).__name__}: {first_line(error)})"


def _memory(
    shape: Shape, process: int, adapter: int, state: int, course: Course | None, teacher: Shape | None, copied: int
) -> Memory:
    """``copied``: bytes of the states of the student that are kept for a teacher and its schedule."""
    weights = shape.loaded_bytes
    teaching = copied + (0 if teacher is None else teacher.loaded_bytes)
    kept = gradients = workspace = evaluation = gaps = 0
    if course is not None:
        kept, gradients, workspace = course.step()
        step = kept + gradients + workspace
        evaluation = max(0, course.evaluation_peak() - step)
        gaps = max(0, heap_peak(course.blocks) - step - evaluation) if _keeps_gaps() else 0
    later = state + kept + gradients + workspace + evaluation + gaps + teaching
    loading = max(0, shape.loading_bytes - weights - adapter - later)
    if teacher is not None:  # which is loaded when the adapter is there
        loading = max(loading, teacher.loading_bytes - later)
    return Memory(process, weights, adapter, state, kept, gradients, workspace, evaluation, gaps, loading, teaching)


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers, shared ones once."""
    tensors: Sequence[torch.Tensor] = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def _keeps_gaps() -> bool:
    return platform.libc_ver()[0] == "glibc" and not torch.accelerator.is_available()


def _dtype_of_folder(folder: Path, stored: StoredWeights) -> torch.dtype | None:
    """The format of the weights, where the config names none; transformers goes by it then."""
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    named = config.get("dtype") or config.get("torch_dtype")
    return None if named else FORMATS.get(stored.main_dtype)
