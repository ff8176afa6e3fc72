"""`lorafa train`: fine-tune a model, measure it before and after, write a run directory."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafa.cli.sweeps import HELP, swept
from lorafa.errors import ConfigError
from lorafa.launch import ending_together, join
from lorafa.processes import from_main, is_main

if TYPE_CHECKING:
    from rich.console import Console

    from lorafa.train.settings.run import RunConfig

DESCRIPTION = """\
Fine-tune a model with low-rank adapters.

Without settings: SmolLM2-135M-Instruct learns grade-school word problems on this machine.
Shows which modules are adapted and one sample with its trained tokens, measures held-out accuracy and
answer loss before and after, and writes a run directory: config.yaml, environment.json, metrics.jsonl,
result.json, adapter/ (PEFT's format) and report.html. Nothing that exists is overwritten."""

EXAMPLES = """\
examples:
  lorafa train                                     the default run
  lorafa train --dry-run                           settings, coverage and one sample; trains nothing
  lorafa train model=path/to/model data=mine.jsonl your model on your records
  lorafa train data=[a.jsonl,b.csv] data.weights=[3,1]
                                                   several sources, three rows of one for one of the other
  lorafa train peft=dora init=pissa peft.r=32      another method, another start, another rank
  lorafa train optim.lr=5e-4 train.steps=300       other numbers
  lorafa train objective=dpo data=pairs.jsonl      prefer one of two answers (TRL); orpo, kto, reward, grpo
  lorafa train train.resume=runs/20260101-120000-lora-r16
                                                   continue a run that was cut short
  lorafa train train.resume=runs/20260101-120000-lora-r16 train.steps=200
                                                   train one for longer (optim.schedule=constant and its like)
  lorafa train -m optim.lr=1e-3,2e-3 run_dir=runs/lr
                                                   a run for each rate, and a table of them
  lorafa train run_dir=runs/a if_exists=resume     start or continue, as a job that is started again should

exit status: 0 done, 1 the work failed (what was recorded stays in the run directory), 2 wrong arguments
or settings (nothing is written), 130 interrupted"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "train",
        help="fine-tune a model, measure it before and after, write a run directory",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=_HelpWithSettings, help="show this help with all settings and exit")
    parser.add_argument("-m", "--multirun", action="store_true", help=HELP)
    parser.add_argument("--dry-run", action="store_true", help="show settings, coverage and one sample; train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="a setting, see below")
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.conf.compose import compose, options  # Hydra and PyTorch load only when a command runs
    from lorafa.train.memory import keep_freed_memory

    keep_freed_memory()  # before the first tensor
    join_all(console, "-m lorafa.cli.main train")
    if args.multirun and (status := swept(args, console, compose, options)) is not None:
        return status
    config = from_main(lambda: compose(args.overrides))
    longer = longer_of(args.overrides, config) if config.train.resume else None
    if args.dry_run:
        return show(config, longer, console)
    from lorafa.runs.experiment import resume_run

    if not config.train.resume:
        return carry_out(config, console, args.command)
    return conclude(resume_run(config.train.resume, console, args.command, longer, config), console)


def join_all(console: Console, command: str) -> None:
    """Make one group of the processes a launcher has started, of which the first alone prints."""
    join(command)
    if not is_main():
        console.quiet = True


def carry_out(config: RunConfig, console: Console, command: Sequence[str]) -> int:
    """Start a run, or continue it where the settings say so, and show what came out."""
    from lorafa.runs.experiment import start_run

    return conclude(start_run(config, console, command), console)


def conclude(path: Path, console: Console) -> int:
    """Show what came out of a run, and write its report."""
    from lorafa.report.page import write_report
    from lorafa.report.tables import result_tables
    from lorafa.runs.record import RunDirectory

    if not is_main():
        return 0
    console.print(result_tables(RunDirectory(path)), crop=False)
    run = RunDirectory(path)
    what = f"Model:   {run.model}" if "model" in run.result() else f"Adapter: {run.adapter}"
    text = f"{what}\nReport:  {write_report(path)}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def show(config: RunConfig, longer: Mapping[str, Any] | None, console: Console) -> int:
    """Show what a run would do, and do none of it."""
    from lorafa.costs.fits import require_room
    from lorafa.runs.experiment import begun, resumable
    from lorafa.runs.record import RunDirectory
    from lorafa.settings.typed import plain
    from lorafa.train.recipe import prepare

    would = "start"
    if config.train.resume:
        given, resume = config, config.train.resume
        run, checkpoint, config = from_main(lambda: resumable(resume, longer, given))
        would = f"continue from {checkpoint.name} in {run.path}"
    elif there := from_main(lambda: begun(config)):
        would = f"go on in {there.path}"
    else:
        from_main(lambda: RunDirectory.place(config))  # a directory in the way would stop the run
    console.print_json(data=plain(config))
    with ending_together():
        prepare(config, console, partial(require_room, config))
    text = f"Dry run: nothing was trained, nothing was written. The run would {would}."
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


LONGER = ("steps", "epochs", "patience")
"""Settings of ``train`` that a run may be continued with."""
BESIDE_RESUME = (
    "train.resume", *(f"train.{one}" for one in LONGER), "model.trust_remote_code", "align.trust_remote_code"
)  # fmt: skip
"""All settings that may stand beside it."""
CODE = ("objective", "objective.reward")
"""Settings that may stand there, too, where they name functions of the user's anew."""


def longer_of(overrides: Sequence[str], config: RunConfig) -> dict[str, Any]:
    """How long the continued run is to be, where that is said; other settings are refused."""
    named = {text: text.lstrip("+").partition("=")[0] for text in overrides}
    allowed = (*BESIDE_RESUME, *CODE) if config.objective.code else BESIDE_RESUME
    others = [text for text, key in named.items() if key not in allowed]
    if others:
        raise ConfigError(
            f"A continued run keeps its settings, found {' '.join(others)!r} beside train.resume. Leave them out "
            "(train.steps, train.epochs, train.patience, trust_remote_code and a reward of one's own may be given), or "
            "start a new run without train.resume."
        )
    return {one: getattr(config.train, one) for one in LONGER if f"train.{one}" in named.values()}


class _HelpWithSettings(argparse.Action):
    """Like argparse's own help, followed by every setting; composing the configs waits until it is asked for."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=kwargs["help"])

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(parser.format_help())
        from lorafa.cli.settings import settings_help  # Hydra, which an installation may lack: the rest stands already

        print(settings_help())
        parser.exit()
