"""`lorafa export`: an adapter in the form another program reads."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lorafa.cli.trusted import add_trust
from lorafa.errors import ConfigError
from lorafa.export import EXPORTERS

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = """\
Write an adapter in the form another program reads, or refuse what it cannot hold by its name.

ADAPTER is the folder or Hub id of an adapter, or a run directory. What is plain LoRA in the end (KaSA, LoRA-SB,
QA-LoRA, VeLoRA, every start) is written exactly, with ranks, alphas and rsLoRA turned into what the program reads. DoRA
is of full rank: give --rank to have the nearest LoRA and be told what is lost, or --merged for the whole model."""

EXAMPLES = """\
examples:
  lorafa export runs/a --for vllm --out served                  one rank and one alpha for all layers
  lorafa export runs/a/adapter --for peft --out plain           a plain LoRA file, nothing in it that is lorafa's own
  lorafa export runs/a --for gguf --out gguf --verify           llama.cpp's adapter; read back and compared
  lorafa export runs/a --for ollama --out ollama --base path/to/base
  lorafa export dora --for vllm --rank 32 --base path/to/base --out served
  lorafa export dora --for vllm --rank 0.99 --base path/to/base --out served
                                                                the least ranks that keep 99 % of the energy
  lorafa export dora --for vllm --merged --out model            the whole model

targets: {targets}

exit status: 0 done, 1 the program cannot hold the adapter, or a file cannot be read or written, 2 wrong arguments"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    targets = EXPORTERS.names()
    parser = commands.add_parser(
        "export",
        help="write an adapter for vLLM, SGLang, llama.cpp, Ollama or PEFT",
        description=DESCRIPTION,
        epilog=EXAMPLES.format(targets=", ".join(targets)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder, Hub id or run directory")
    parser.add_argument("--for", dest="target", required=True, choices=targets, help="the program that will read it")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--rank", metavar="R", help="rank of every layer, or the share of its energy to keep (0.99)")
    parser.add_argument("--base", metavar="MODEL", help="load this base model, in place of reading files alone")
    parser.add_argument("--merged", action="store_true", help="write the whole model with the adapter in its weights")
    parser.add_argument("--verify", action="store_true", help="read back what was written, and compare; with logits")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder that is there")
    add_trust(parser)
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.cli.screen import Screen
    from lorafa.export.job import export_adapter

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    rank = None if args.rank is None else rank_of(args.rank)
    with Screen(stderr=True, quiet=console.quiet).status(f"Exporting {args.adapter}"):
        done = export_adapter(
            args.adapter, args.target, args.out, rank=rank, base=args.base, merged=args.merged, verify=args.verify,
            overwrite=args.overwrite, trust_remote_code=args.trust_remote_code,
        )  # fmt: skip
    for note in done.notes:
        say(note)
    for path, share in done.lost.shares.items() if done.lost is not None else ():
        say(f"  {share:7.3%}  {path}")
    if done.proof is not None:
        say(done.proof.in_words())
    say(f"Written: {done.folder} ({', '.join(done.files)})")
    return 0


def rank_of(text: str) -> int | float:
    """The rank that a word means: a whole number, or a share with a point in it.

    Raises:
        ConfigError: it is neither.
    """
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise ConfigError(f"--rank is a whole number, or a share such as 0.99, found {text!r}.") from None
