"""`lorafa train`: fine-tune a model, measure it before and after, write a run directory."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
  lorafa train peft=dora init=pissa peft.r=32      another method, another start, another rank
  lorafa train optim.lr=5e-4 train.steps=300       other numbers
  lorafa train train.resume=runs/20260101-120000-lora-r16
                                                   continue a run that was cut short
  lorafa train train.resume=runs/20260101-120000-lora-r16 train.steps=200
                                                   train one for longer (optim.schedule=constant and its like)
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
    parser.add_argument("--dry-run", action="store_true", help="show settings, coverage and one sample; train nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[], help="a setting, see below")
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.conf.compose import compose  # Hydra and PyTorch load only when a command runs
    from lorafa.train.memory import keep_freed_memory

    keep_freed_memory()  # before the first tensor
    join("train")
    if not is_main():
        console.quiet = True
    config = from_main(lambda: compose(args.overrides))
    longer = longer_of(args.overrides, config) if config.train.resume else None
    if args.dry_run:
        return _dry_run(config, longer, console)
    from lorafa.report.page import write_report
    from lorafa.report.tables import result_tables
    from lorafa.runs.experiment import resume_run, start_run
    from lorafa.runs.record import RunDirectory

    if config.train.resume:
        path = resume_run(config.train.resume, console, args.command, longer)
    else:
        path = start_run(config, console, args.command)
    if not is_main():
        return 0
    console.print(result_tables(RunDirectory(path)))
    text = f"Adapter: {path / 'adapter'}\nReport:  {write_report(path)}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def _dry_run(config: RunConfig, longer: Mapping[str, Any] | None, console: Console) -> int:
    from lorafa.runs.experiment import begun, resumable
    from lorafa.runs.record import RunDirectory
    from lorafa.settings.typed import plain
    from lorafa.train.recipe import prepare

    would = "start"
    if config.train.resume:
        resume = config.train.resume
        run, checkpoint, config = from_main(lambda: resumable(resume, longer))
        would = f"continue from {checkpoint.name} in {run.path}"
    elif there := from_main(lambda: begun(config)):
        would = f"go on in {there.path}"
    else:
        from_main(lambda: RunDirectory.place(config))  # a directory in the way would stop the run
    console.print_json(data=plain(config))
    with ending_together():
        prepare(config, console)
    text = f"Dry run: nothing was trained, nothing was written. The run would {would}."
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


LONGER = ("steps", "epochs", "patience")
"""Settings of ``train`` that a run may be continued with."""


def longer_of(overrides: Sequence[str], config: RunConfig) -> dict[str, Any]:
    """How long the continued run is to be, where that is said; other settings are refused."""
    named = {text: text.lstrip("+").partition("=")[0].replace("model.epochs", "train.epochs") for text in overrides}
    others = [text for text, key in named.items() if key not in ("train.resume", *(f"train.{one}" for one in LONGER))]
    if others:
        raise ConfigError(
            f"A continued run keeps its settings, found {' '.join(others)!r} beside train.resume. Leave them out "
            "(train.steps, train.epochs and train.patience may be given), or start a new run without train.resume."
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
