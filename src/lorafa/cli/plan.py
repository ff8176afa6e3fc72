"""`lorafa plan`: what a run will take and what to set, before any weight is loaded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorafa.costs.sizes import size
from lorafa.errors import ConfigError
from lorafa.models import MODELS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lorafa.costs.advice import Advice
    from lorafa.costs.batches import Batches
    from lorafa.costs.memory import Counted, Shape
    from lorafa.costs.probe import Probe
    from lorafa.train.coverage import CoverageRow
    from lorafa.train.settings.run import RunConfig

DESCRIPTION = """\
Plan a run before any weight is loaded: what the adapter covers, what the run takes of memory by component, and what to
set for rank, alpha, dropout, targets, start, optimizer and rate, each with its reason.

Reads the model's config, the headers of its safetensors files, and the rows of the data, but for those of a Hub id.
Lets the run's own code go through an evaluation and a training step without numbers, and counts what it allocates.
Takes the settings of `lorafa train`. Counts a run in one process on a CPU."""

EXAMPLES = """\
examples:
  lorafa plan                                                  the default run
  lorafa plan model=path/to/model data=mine.jsonl peft.r=64    your model, rows and settings
  lorafa plan model=llama-3-8b data.max_length=512             a model known by its shape: rows as long as allowed
  lorafa plan train.gradient_checkpointing=true                what checkpointing saves
  lorafa plan --probe                                          two real steps besides: the time, and the measured peak
  lorafa plan --json                                           the same for programs, bytes

models known by name: {shapes}

exit status: 0 done (also where the run would not fit, which is said), 1 the model or the rows cannot be had or used,
2 wrong arguments or settings"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "plan",
        help="count a run's memory before any weight is loaded, and say what to set",
        description=DESCRIPTION,
        epilog=EXAMPLES.format(shapes=", ".join(MODELS.names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--probe", action="store_true", help="load the model and measure two training steps")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="a setting of `lorafa train`")
    return parser


@dataclass(frozen=True)
class Planned:
    """A run, planned."""

    config: RunConfig
    shape: Shape
    batches: Batches
    counted: Counted
    coverage: list[CoverageRow]
    advice: list[Advice]
    left: int | None
    """Bytes that stay free at its peak, below 0 where it does not fit; None where that is unknown."""
    accelerator: str | None = None
    """The device type of the accelerator there is; None where there is none."""
    probe: tuple[Probe, int | None] | None = None
    """What two steps measured, and the peak of this process afterwards."""


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.conf.compose import compose  # Hydra, torch and transformers load only when a command runs
    from lorafa.train.memory import keep_freed_memory

    keep_freed_memory()  # as in a training
    config = compose(args.overrides)
    if config.train.resume:
        config = _resumed(args.overrides, config)
    planned = plan(config, console, args.probe)
    if args.json:
        console.print_json(data=as_json(planned))
        return 0
    _show(planned, console)
    return 0


def plan(config: RunConfig, console: Console, probed: bool = False) -> Planned:
    """Plan a run.

    Raises:
        LoraError: of the kind that fits: the model, the rows or a setting is wrong.
    """
    from rich.console import Console as Terminal

    from lorafa.costs.advice import advise, facts_of
    from lorafa.costs.batches import bounds, of_rows
    from lorafa.costs.fits import left_after
    from lorafa.costs.memory import count, covered, shape_of
    from lorafa.costs.probe import probe
    from lorafa.runs.peaks import peak_rss_bytes
    from lorafa.train.progress import progress_bar
    from lorafa.train.records import answers_of, find_records

    if not config.objective.entry.is_own:
        raise ConfigError(
            f"lorafa plan counts trainings of answers (objective=sft), found objective={config.objective.name}, whose "
            "steps are TRL's. Plan the same settings without it: a pair is two rows of a batch, and a reference is one "
            "more forward pass and a copy of what is trained."
        )
    quiet = Terminal(quiet=True)
    why = _not_read(config)
    found = None if why else find_records(config.data)
    shape = shape_of(config.model, config.peft.adapter, None if found is None else lambda: answers_of(found))
    if found is None:
        batches = bounds(config, shape.model, why, shape.kind)
    else:
        batches = of_rows(config, found, shape.model, shape.kind, quiet)
    rows = covered(shape, config)
    with progress_bar(Terminal(stderr=True), "Counting evaluations and a step") as bar:
        counted = count(shape, config, batches, bar)
    share = sum(row.base for row in rows if row.matched) / max(1, sum(row.base for row in rows))
    advice = advise(facts_of(shape.model, shape.parameters, share, batches.steps), config)
    left = left_after(counted.memory)
    measured = (probe(config, quiet), peak_rss_bytes()) if probed else None
    return Planned(config, shape, batches, counted, rows, advice, left, accelerator_here(), measured)


def accelerator_here() -> str | None:
    """The type of the accelerator that a run on this machine would take; None where there is none."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None else device.type


def _resumed(overrides: Sequence[str], config: RunConfig) -> RunConfig:
    """The settings of the run that ``train.resume`` names, as `lorafa train` would go on with it.

    Raises:
        LoraError: it cannot be continued, or not with these settings.
    """
    from lorafa.cli.train import longer_of
    from lorafa.runs.experiment import resumable

    return resumable(str(config.train.resume), longer_of(overrides, config), config)[2]


def _not_read(config: RunConfig) -> str:
    """Why the rows are not read, in words; an empty text where they are."""
    from lorafa.data.files import is_file
    from lorafa.data.shares import names_of
    from lorafa.storage.paths import user_path

    name = config.model.name
    if name in MODELS and MODELS.get(name).fetch is None:
        return f"{name} is known by its shape only, without a tokenizer"
    names = [each for each in names_of(config.data.name) if "/" in each and not is_file(each)]
    on_hub = [each for each in names if not os.path.exists(user_path(each))]
    return f"the rows of {on_hub[0]} are not fetched for a plan" if on_hub else ""


def as_json(planned: Planned) -> dict[str, Any]:
    """Plain values: bytes, numbers, texts."""
    memory, stored, cost = planned.counted.memory, planned.shape.stored, planned.counted.adapter
    result: dict[str, Any] = {
        "model": planned.config.model.name,
        "parameters": planned.shape.parameters,
        "trained": None if cost is None else cost.trainable,
        "stored": None if stored is None else {k: v for k, v in asdict(stored).items() if k != "shapes"},
        "coverage": [asdict(row) for row in planned.coverage],
        "batches": asdict(planned.batches),
        "memory": {**asdict(memory), "total": memory.total},
        "left": planned.left,
        "advice": [{**asdict(each), "words": each.words} for each in planned.advice],
        "notes": notes(planned),
    }
    if planned.probe is not None:
        measured, peak = planned.probe
        result["probe"] = {**asdict(measured), "peak_rss_bytes": peak}
    return result


def _show(planned: Planned, console: Console) -> None:
    from lorafa.train.coverage import coverage_table

    if planned.coverage:
        console.print(coverage_table(planned.coverage))
    console.print(memory_table(planned))
    console.print(advice_table(planned.advice))
    for each in planned.advice:
        console.print(f"{each.words}: {each.reason}", highlight=False, markup=False)
        if each.against:
            console.print(f"  But {each.against}.", highlight=False, markup=False)
    if planned.probe is not None:
        measured, peak = planned.probe
        seen = "" if peak is None else f", a peak of {size(peak)} so far (an evaluation may add to it)"
        console.print(
            f"Measured: {measured.seconds:.1f} s in the last of two steps, {measured.tokens_a_second:,.0f} tokens a "
            f"second{seen}. The training would take about {measured.training_seconds / 60:.1f} minutes, evaluations "
            "apart.",
            highlight=False,
            markup=False,
        )
    for note in notes(planned):
        console.print(note, highlight=False, markup=False)


def memory_table(planned: Planned) -> Table:
    """One row a component, and the sum."""
    from rich.table import Table

    from lorafa.costs.fits import NAMES

    memory = planned.counted.memory
    table = Table(title="What the run takes at its peak", title_justify="left")
    table.add_column("")
    table.add_column("memory", justify="right")
    for key, name in NAMES.items():
        table.add_row(name, size(part) if (part := getattr(memory, key)) else "-")
    table.add_section()
    bound = "sum" if planned.counted.uncounted is None else "at least"
    table.add_row(bound, size(memory.total), style="bold")
    return table


def advice_table(advice: Iterable[Advice]) -> Table:
    """One row a setting; the reasons stand below, where they have room."""
    from rich.table import Table

    table = Table(title="What to set", title_justify="left")
    for heading in ("setting", "value", "worth trying"):
        table.add_column(heading)
    for each in advice:
        band = "" if each.low is None or each.high is None else f"{each.low:.3g} to {each.high:.3g}"
        table.add_row(each.setting, f"{each.value:g}" if isinstance(each.value, float) else str(each.value), band)
    return table


def notes(planned: Planned) -> list[str]:
    """What the numbers rest on, and what they leave out."""
    from lorafa.train.settings.init import start_of

    batches, counted, stored = planned.batches, planned.counted, planned.shape.stored
    found = [
        f"Counted for {batches.source}: a training batch of {batches.training.rows} x {batches.training.tokens} tokens."
    ]
    if stored is None:
        found.append("No safetensors headers could be read: the weights are counted by the config alone.")
    if planned.shape.quantized:
        found.append(
            "The model is quantized: its weights are counted as they are stored, its activations as if it were not."
            if stored is not None
            else "The model is quantized; it is counted as if it were not."
        )
    if (way := planned.config.model.quantize) is not None:
        found.append(f"model.quantize={way} is not counted: the base is counted as if it were dense.")
    if (way := planned.config.align.quantize) is not None:
        found.append(f"align.quantize={way} is not counted: the teacher is counted as if it were dense.")
    if counted.uncounted is not None:
        found.append(f"Activations are not counted: {counted.uncounted}. --probe measures them.")
    found += planned.shape.outline.remarks()
    if planned.config.model.add_tokens:
        found.append("The rows of model.add_tokens are not counted.")
    if planned.config.eval.forgetting:
        found.append("What eval.forgetting draws and compares is not counted.")
    if counted.own_loss is not None:
        found.append(f"The model's own loss is counted, which holds all logits: {counted.own_loss}.")
    if start_of(planned.config.init).initializer.needs and not planned.config.peft.full:
        found.append(f"What init={planned.config.init.mode} collects of the data before the training is not counted.")
    if planned.accelerator is not None:
        found.append(
            f"There is an accelerator ({planned.accelerator}), where a run computes. Its memory is not counted: the "
            "figures are those of a run on the CPU. lorafa train reports the peak of both."
        )
    found.append("Counted for one process; each of several takes as much, for its own batch.")
    return [*found, *_fits(planned)]


def _fits(planned: Planned) -> list[str]:
    """Whether the run fits into the memory there is, in words, where that can be told."""
    if planned.left is None:
        return []
    if planned.left < 0:
        at_least = "" if planned.counted.uncounted is None else "at least "
        return [f"THE RUN DOES NOT FIT: {at_least}{size(-planned.left)} are missing."]
    if planned.counted.uncounted is not None:
        return [f"Whether the run fits is not known: {size(planned.left)} are left for what is not counted."]
    if planned.accelerator is not None:
        return [f"On the CPU the run fits: {size(planned.left)} are left. Whether it does there is not known."]
    return [f"The run fits: {size(planned.left)} are left."]
