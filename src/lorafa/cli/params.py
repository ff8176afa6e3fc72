"""`lorafa params`: what an adapter costs, from the model's config alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafa.costs.sizes import size
from lorafa.errors import AdapterError, ConfigError
from lorafa.models import MODELS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lorafa.costs.accounting import AdapterCost
    from lorafa.models.shapes import Outline
    from lorafa.train.settings.run import RunConfig

DESCRIPTION = """\
Count what an adapter costs: parameters by kind of layer, the file, gradients and optimizer state.

Builds the model from its config on the meta device, so no weight is fetched, loaded or allocated, whatever the model's
size. Counts twice, with A and B trained and with A frozen (LoRA-FA), where both can be. Takes the settings of
`lorafa train` in the groups model, peft, init and optim, and refuses an optimizer that could not train the adapter.
Activations are not counted: they depend on the batch."""

EXAMPLES = """\
examples:
  lorafa params                                                the default run's adapter
  lorafa params model=opt-125m peft.r=16 peft.target_modules=[q_proj,v_proj]
  lorafa params model=llama-3-70b peft.r=64 optim=adafactor    70 billion parameters, in seconds
  lorafa params model=path/to/model 'peft.rank_pattern={{down_proj:32}}'
  lorafa params model=opt-1.3b --json                          the same numbers for programs

models known by name: {shapes}
(any other model= is a folder with a config.json, or a Hub id, of which only the config is fetched)

exit status: 0 done, 1 the model's config cannot be had or used, 2 wrong arguments or settings"""

_TRAINED = {"AB": "A and B trained", "A": "B frozen", "B": "A frozen", "": "A and B frozen"}
READ = ("model", "peft", "init", "optim")
"""Groups of settings that decide what is counted."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "params",
        help="count an adapter's parameters and memory from the model's config alone",
        description=DESCRIPTION,
        epilog=EXAMPLES.format(shapes=", ".join(MODELS.names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="a setting of `lorafa train`")
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.conf.compose import compose, refuse_others  # Hydra and torch load only when a command runs
    from lorafa.models.load import DTYPES
    from lorafa.models.shapes import outline

    config = compose(args.overrides)
    refuse_others(args.overrides, READ, "lorafa params", "changes nothing that is counted")
    cache = Path(config.model.cache_dir) if config.model.cache_dir else None
    dtype = DTYPES.get(config.model.dtype)
    where: dict[str, Any] = {"cache_dir": cache, "revision": config.model.revision}
    where["trust_remote_code"] = config.model.trust_remote_code
    found = outline(config.model.name, dtype, kind=config.model.kind, **where)
    try:
        costs, notes = adapter_costs(found, config), _notes(found, config)
    except AdapterError as error:  # there is no adapter yet: settings that do not go together
        raise ConfigError(str(error)) from error
    if args.json:
        console.print_json(
            data={"model": config.model.name, "costs": [_plain(*each) for each in costs], "notes": notes}
        )
        return 0
    console.print(kinds_table(costs[0][1]))
    console.print(costs_table(costs))
    for note in notes:
        console.print(note, highlight=False)
    return 0


def adapter_costs(found: Outline, config: RunConfig) -> list[tuple[str, AdapterCost]]:
    """(words of an optimizer, cost): the optimizer of the settings, then A frozen where B can be trained alone."""
    from lorafa.costs.accounting import adapter_cost
    from lorafa.optimizers import OPTIMIZERS
    from lorafa.train.adapter_config import lora_config
    from lorafa.train.settings.optim import OptimConfig, words

    model = found.model
    adapter = lora_config(config, model, kind=found.kind, new_modules=found.new)
    as_set = adapter_cost(model, adapter, config.optim)
    costs = [(words(config.optim), as_set)]
    if as_set.factors != "AB":
        return costs
    for name in OPTIMIZERS.names():
        if OPTIMIZERS.get(name).freezes == "A":
            # not what was asked for: a start whose A it does not take, or a formula that trains A, has one column
            with suppress(AdapterError, ConfigError):
                frozen = adapter_cost(model, replace(adapter, freeze_A=True), OptimConfig(name=name))
                costs.append((name, frozen))
    return costs


def kinds_table(cost: AdapterCost) -> Table:
    """One row a kind of adapted layer, one for what is trained beside them, and the sums."""
    from rich.table import Table

    table = Table(title="What is added", title_justify="left")
    table.add_column("module")
    for heading in ("layers", "rank", "base", "A", "B", "extras"):
        table.add_column(heading, justify="right", overflow="fold")  # a number is never cut short
    for kind in cost.kinds:
        ranks = ", ".join(map(str, kind.ranks))
        table.add_row(kind.name, str(kind.modules), ranks, *_counts(kind.base, kind.A, kind.B, kind.extras))
    if cost.other:
        table.add_row("trained in full", "", "", "", "", "", f"{cost.other:,}")
    table.add_section()
    modules, base, A, B, extras = (
        sum(getattr(kind, part) for kind in cost.kinds) for part in ("modules", "base", "A", "B", "extras")
    )
    table.add_row("sum", str(modules), "", *_counts(base, A, B, extras + cost.other), style="bold")
    return table


def costs_table(costs: Sequence[tuple[str, AdapterCost]]) -> Table:
    """One column a way of training the adapter; MiB and GiB are powers of two."""
    from rich.table import Table

    first = costs[0][1]
    table = Table(title=f"What it costs on {first.base:,} parameters, {_size(first.base_bytes)}", title_justify="left")
    table.add_column("")
    for optimizer, cost in costs:
        table.add_column(f"{_TRAINED[cost.factors]}, {optimizer}", justify="right")
    for name, cell in _ROWS.items():
        table.add_row(name, *(cell(cost) for _, cost in costs))
    return table


def _counts(*numbers: int) -> tuple[str, ...]:
    return tuple(f"{number:,}" if number else "-" for number in numbers)


def _size(number: int) -> str:
    return size(number, digits=2)  # an adapter may be smaller than a tenth of a MiB


_ROWS: Mapping[str, Callable[[AdapterCost], str]] = {
    "trained parameters": lambda cost: f"{cost.trainable:,}",
    "share of the base": lambda cost: f"{cost.share:.2%}",
    "trained numbers, float32": lambda cost: _size(4 * cost.trainable),
    "trained numbers, 16 bit": lambda cost: _size(2 * cost.trainable),
    "adapter file, float32": lambda cost: _size(4 * cost.stored),
    "adapter file, 16 bit": lambda cost: _size(2 * cost.stored),
    "gradients": lambda cost: _size(cost.gradient_bytes),
    "optimizer state": lambda cost: _size(cost.state_bytes),
}


def _plain(optimizer: str, cost: AdapterCost) -> dict[str, Any]:
    trained = " and ".join(cost.factors)
    numbers = {**asdict(cost), "trainable": cost.trainable, "share": cost.share}
    return {"optimizer": optimizer, "trained": trained, **numbers}


def _notes(found: Outline, config: RunConfig) -> list[str]:
    """What the numbers leave out, where they leave something out."""
    from lorafa.train.adapter_config import lora_config

    notes, initializer = [], lora_config(config).start.initializer
    if initializer.moves_base:
        notes.append(
            f"init={config.init.mode} is computed from the weights, which are not there. What it takes out of the base "
            "stays with the adapter: the file, of rank 2r, is counted with it; in memory frozen copies of A and B come "
            "on top."
        )
    if initializer.quantizer:
        notes.append(f"init={config.init.mode} quantizes the base; it is counted as if it did not.")
    if (way := config.model.quantize) is not None:
        notes.append(f"model.quantize={way} is not counted: the base is counted as if it were dense.")
    notes += found.remarks()
    if getattr(found.model.config, "quantization_config", None):
        notes.append("The model is stored quantized; the base is counted as if it were not.")
    return notes
