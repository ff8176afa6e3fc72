"""`lorafa inspect`: what an adapter is, by its file, on a base model, and beside another adapter."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lorafa.cli.trusted import add_trust
from lorafa.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from lorafa.inspection.adapter import Inspection, Load

DESCRIPTION = """\
Look into an adapter: the norm, spectrum and effective rank of the update of each layer, and where its energy lies.

ADAPTER is the folder or Hub id of an adapter, or a run directory, which has one. Its file alone is read, through the
factors: no model is loaded. With --base the model is: does the adapter fit it, how large is the update beside each
weight, are there intruder dimensions, and how far do the logits move on a text. With --other the two adapters are
compared layer by layer: the cosine of the updates, and how much the spaces of A's rows and of B's columns share."""

EXAMPLES = """\
examples:
  lorafa inspect runs/20260101-120000-lora-r16               by its file
  lorafa inspect runs/a/adapter --base path/to/model         on its base: fit, intruders, effect on logits
  lorafa inspect runs/a/adapter --base path/to/model --text mine.txt
                                                             the effect on a text of your own
  lorafa inspect runs/a --other runs/b                       how like each other two adapters are
  lorafa inspect owner/adapter --page adapter.html           from the Hub, with a page of drawings
  lorafa inspect runs/a --json                               every number, for programs

exit status: 0 done, 1 the adapter does not fit the base (the rest is told), is damaged or could not be read, 2 wrong
arguments"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "inspect",
        help="look into an adapter: norms, spectra, ranks, intruders, likeness to another",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder or Hub id of an adapter, or a run directory")
    parser.add_argument("--base", metavar="MODEL", help="load this base model and measure the adapter on it")
    parser.add_argument("--other", metavar="ADAPTER", help="another adapter to compare it with")
    parser.add_argument("--text", metavar="FILE", help="measure the effect on the logits on this text (with --base)")
    parser.add_argument("--top", metavar="N", type=int, default=10, help="layers in the table (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--page", metavar="FILE.html", help="also write a page with drawings, one file")
    add_trust(parser)
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.inspection.adapter import inspect
    from lorafa.runs.adapters import adapter_in
    from lorafa.storage.paths import user_path

    if args.top < 0:
        raise ConfigError(f"--top is a number of layers, 0 or more, found {args.top}.")
    if args.text and not args.base:
        raise ConfigError("--text is what the effect on the logits is measured on, which needs --base. Give both.")
    if args.trust_remote_code and not args.base:
        raise ConfigError("--trust-remote-code lets the base model run its code, and none is loaded. Give --base, too.")
    text = None if args.text is None else _read(args.text)
    adapter = adapter_in(args.adapter)
    found = inspect(
        adapter,
        name=args.adapter,
        base=None if args.base is None else _loading(args.base, adapter, trusted=args.trust_remote_code),
        base_name=args.base,
        other=None if args.other is None else adapter_in(args.other),
        other_name=args.other,
        text=text,
        each=lambda layers: _shown(layers, console),
    )
    page = None
    if args.page:
        from lorafa.report.inspection import write_inspection

        page = write_inspection(user_path(args.page), found)
    if args.json:
        from lorafa.report.values import finite

        console.print_json(data=finite(found.to_dict()))
    else:
        _say(found, args.top, console)
        if page is not None:
            console.print(f"Page: {page}", highlight=False, markup=False, soft_wrap=True)
    return int(found.base is not None and not found.base.fit.fits)


def _say(found: Inspection, top: int, console: Console) -> None:
    from lorafa.report.fitted import Facts, Fitted
    from lorafa.report.inspected import facts, intruder_rows, kind_table, layer_table

    console.print(Facts(facts(found)), crop=False)
    console.print(Fitted(*kind_table(found), "Kinds of layer (medians; shares and intruders: sums)", 1), crop=False)
    shown = min(top, len(found.layers))
    if shown:
        title = f"The {shown} of {len(found.layers)} layers with most of the energy"
        console.print(Fitted(*layer_table(found, shown), title, 1), crop=False)
    if intruders := intruder_rows(found)[:top]:
        headings = ("layer", "place", "singular value", "of the largest", "cosine")
        title = f"Intruder dimensions, {len(intruders)} of {found.intruders}"
        console.print(Fitted(headings, intruders, title, 1), crop=False)
    unreadable = [] if found.base is None else [f"{name}: {why}" for name, why in found.base.unreadable.items()]
    for note in [*found.notes, *unreadable]:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def _read(file: str) -> str:
    from lorafa.storage.paths import user_path

    try:
        text = user_path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ConfigError(f"--text {file} could not be read: {reason}. Name a text file.") from error
    if not text.strip():
        raise ConfigError(f"--text {file} is blank, so nothing can be read of it. Name another file.")
    return text


def _loading(name: str, adapter: str, *, trusted: bool) -> Load:
    """How the base model comes, with the tokenizer, once it is needed."""

    def load() -> tuple[Any, Any]:
        from lorafa.data.classes import classes_beside
        from lorafa.models.load import on_accelerator
        from lorafa.models.vocabulary import tokenizer_beside
        from lorafa.train.base_model import load_base, with_kind_of
        from lorafa.train.settings.model import ModelConfig

        settings = with_kind_of(ModelConfig(name=name, trust_remote_code=trusted), adapter)
        base = load_base(settings, classes=classes_beside(adapter))
        tokenizer = tokenizer_beside(adapter, base.model, trust_remote_code=trusted) or base.tokenizer
        if base.new_modules:  # its outputs are random: there is nothing to compare with
            tokenizer = None
        return on_accelerator(base.model), tokenizer

    return load


def _shown(layers: Iterable[Any], console: Console) -> Iterable[Any]:
    """The layers one by one, with a bar on stderr: no part of what a file or a pipe is given."""
    from rich.progress import track

    from lorafa.cli.screen import Screen

    screen = Screen(stderr=True, quiet=console.quiet)
    return track(list(layers), "Measuring layers", console=screen, transient=True)
