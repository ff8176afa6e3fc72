"""Put the adapter of a run on, with what its start reads of the training rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lorafa.calibration import STATISTICS
from lorafa.config import LoraConfig
from lorafa.data.chat import IGNORE, Sample
from lorafa.data.collate import Collate
from lorafa.data.prepared import SampleSet
from lorafa.errors import DataError
from lorafa.initializers.base import TRAIN_ROWS
from lorafa.models.vocabulary import rows_to_train
from lorafa.peft_model import PeftModel, get_peft_model
from lorafa.processes import share, world_size
from lorafa.starts.initialize import collect_joint_statistics, collect_statistics, start_from
from lorafa.starts.joint import JointStart, joint_loss_of
from lorafa.storage.paths import user_path
from lorafa.surgery.resolve import resolve
from lorafa.train.adapter_config import lora_config
from lorafa.train.base_model import BaseModel
from lorafa.train.full import train_all
from lorafa.train.settings.init import InitConfig, rank_rule, start_of
from lorafa.train.settings.run import RunConfig
from lorafa.train.teacher import joint_start

HELD_OUT = 8
"""Rows after those of the statistics that ``stable_gamma=auto`` compares losses on."""
SHOWN = 64
"""Singular values of a layer that are recorded, or more where a rank is larger."""


@dataclass(frozen=True)
class Started:
    """A model that can be trained, and what is recorded of how it started."""

    model: Any
    """A PeftModel, or with ``peft.full`` a model of transformers."""
    record: dict[str, Any] = field(default_factory=dict)
    teacher: Any = None
    """The other model that the start has read, for the training to go on with; None where it has read none."""


def begin(base: BaseModel, samples: SampleSet, collator: Collate, config: RunConfig) -> Started:
    """The model as its training begins: all of it trained, with the adapter of a file, or with a new one."""
    model = base.model
    if config.peft.full:
        train_all(model)
        return Started(model)
    if config.peft.adapter is not None:
        return Started(PeftModel.from_pretrained(model, user_path(config.peft.adapter), is_trainable=True))
    new_rows = rows_to_train(model, base.new_tokens) if base.new_tokens else None
    adapter = lora_config(config, model, new_rows, base.kind, base.new_modules)
    joint = partial(joint_start, config.align, model, base.tokenizer)
    return start_adapter(model, adapter, config.init, samples.train.samples, collator, joint)


def start_adapter(
    model: nn.Module,
    adapter: LoraConfig,
    init: InitConfig,
    samples: Sequence[Sample],
    collator: Collate,
    joint: Callable[[], JointStart | None] = lambda: None,
) -> Started:
    """``get_peft_model``, after collecting what the start or the ranks are chosen by over the first rows.

    Args:
        joint: the teacher beside the task, loaded where gradients are read; None for the task alone.

    Raises:
        DataError: there are fewer rows than that takes.
        LoraError: as :func:`lorafa.initialize`.
    """
    needs, rule = start_of(init).initializer.needs, rank_rule(init)
    if not needs and rule is None:
        return Started(get_peft_model(model, adapter))
    began = time.monotonic()
    adapter = _with_rows(adapter, len(samples))
    count = init.bsz * init.iters
    rows, held = samples[:count], samples[count : count + HELD_OUT]
    tries = getattr(adapter.init_config, "stable_gamma", None) == "auto"
    if len(rows) < count or (tries and not held):
        raise DataError(
            f"init reads {count} rows (init.bsz * init.iters), and for stable_gamma=auto a few more; there are "
            f"{len(samples)} to train on. Lower init.iters."
        )
    collecting: dict[str, Any] = {"passes": init.passes, "also": ()} | ({} if rule is None else rule.reads())
    collecting["halves"] = bool(collecting.get("halves")) and init.iters > 1
    read = [STATISTICS.get(name) for name in (*needs, *collecting["also"])]
    if any(statistic.reads_gradient for statistic in read):
        _require_answers([*rows, *held], init.max_length)
    batches = share(_batches(rows, init.bsz, init.max_length, collator))
    resolved = resolve(model, adapter)
    asked = joint() if any(statistic.linear for statistic in read) else None
    if asked is None:
        stats = collect_statistics(model, resolved, batches, **collecting)
    else:
        stats = collect_joint_statistics(model, resolved, batches, asked, **collecting).at()
    compared = None if asked is None or not tries else joint_loss_of(asked, stats)
    heldout = _batches(held, 1, init.max_length, collator) if tries else None
    if heldout is not None and len(heldout) % world_size() == 0:  # each process is to have as many; or all have all
        heldout = share(heldout)
    adapted = start_from(model, resolved, stats, ranks=rule, heldout=heldout, loss=compared)
    ranks = {path: layer.r["default"] for path, layer in adapted.base_model.lora_layers()}
    record: dict[str, Any] = {
        "rows": count,
        "bytes": stats.nbytes,
        "seconds": round(time.monotonic() - began, 1),
        "ranks": dict.fromkeys(stats, 0) | ranks,
        "fallbacks": {path: layer.fallbacks["default"] for path, layer in _fallen_back(adapted)},
        "spectra": _spectra(stats, max(SHOWN, *ranks.values())),
    }
    record |= {} if asked is None else {"joint": stats.about["joint"]}
    if (divisor := getattr(adapter.init_config, "samples", None)) is not None:
        record["samples"] = divisor if isinstance(divisor, int) else count
    gamma = getattr(adapted.peft_config["default"].init_config, "stable_gamma", None)
    teacher = None if asked is None or isinstance(asked.teacher, str) else asked.teacher
    return Started(adapted, record | ({} if gamma is None else {"stable_gamma": gamma}), teacher)


def _with_rows(adapter: LoraConfig, rows: int) -> LoraConfig:
    """The config with the number of training rows, where its start asks for it."""
    if getattr(adapter.init_config, "samples", None) != TRAIN_ROWS:
        return adapter
    return replace(adapter, init_config=replace(adapter.init_config, samples=rows))


def _require_answers(rows: Sequence[Sample], longest: int) -> None:
    """Raises DataError for a row none of whose first tokens is trained."""
    for number, row in enumerate(rows, 1):
        if not any(label != IGNORE for label in row.labels[1:longest]):
            raise DataError(
                f"init reads gradients, and {row.place or f'row {number} of the training rows'} has no trained token "
                f"among its first {longest}. Raise init.max_length."
            )


def _fallen_back(model: PeftModel) -> list[tuple[str, Any]]:
    return [(path, layer) for path, layer in model.base_model.lora_layers() if "default" in layer.fallbacks]


def _batches(rows: Sequence[Sample], size: int, longest: int, collator: Collate) -> list[dict[str, Tensor]]:
    cut = [replace(row, input_ids=row.input_ids[:longest], labels=row.labels[:longest]) for row in rows]
    return [dict(collator(cut[at : at + size])) for at in range(0, len(cut), size)]


def _spectra(stats: Any, most: int) -> dict[str, list[float]]:
    """The leading singular values of each layer's statistic, at most so many, three digits of them."""
    found = {}
    for layer, tensors in stats.items():
        for name in ("gradient.S", "whitened_gradient.S", "principal.singular_values"):
            if name in tensors:
                found[layer] = [float(f"{value:.3g}") for value in tensors[name][:most].tolist()]
                break
    return found
