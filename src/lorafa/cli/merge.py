"""`lorafa merge`: fold adapters into their base model, file by file."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lorafa.cli.trusted import add_trust

if TYPE_CHECKING:
    from rich.console import Console

DESCRIPTION = """\
Fold an adapter into its base model and write the folder of an ordinary model.

ADAPTER is the folder or Hub id of an adapter, or a run directory. With several adapters of one base their updates are
summed. The base, in safetensors, is read and written layer by layer: the model is never in memory. Each adapted weight
is summed in float32 and rounded once, all else is copied byte for byte; config, generation config, tokenizer and chat
template are carried along. An adapter that does not fit is refused before anything is written, and the folder is there
only when all of it is."""

EXAMPLES = """\
examples:
  lorafa merge runs/a --out merged/
  lorafa merge path/to/adapter --base path/to/model --out merged/ --verify
  lorafa merge owner/adapter --out merged/ --dtype bfloat16 --max-shard-size 5GB
  lorafa merge first/adapter second/adapter --out both/

exit status: 0 done, 1 the work failed or the adapter does not fit (nothing is left), or --verify finds an error that
rounding does not explain (the folder is left), 2 wrong arguments, 130 interrupted (nothing is left)"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "merge",
        help="fold adapters into their base model",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapters", metavar="ADAPTER", nargs="+", help="what is merged")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to make")
    parser.add_argument("--base", metavar="MODEL", help="base model: folder or Hub id (default: the adapter names it)")
    parser.add_argument(
        "--dtype", metavar="DTYPE", help="float32, bfloat16 or float16 (default: each weight's own, as in the base)"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="split the weights anew, for example 5GB (default: as the base)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model's folder that is there")
    parser.add_argument(
        "--verify", action="store_true", help="load both models afterwards and compare outputs (takes their memory)"
    )
    parser.add_argument(
        "--ignore-base-mismatch", action="store_true", help="merge into a base the adapter was not made for"
    )
    add_trust(parser)
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.cli.screen import Screen
    from lorafa.io.stream import merge_to_folder
    from lorafa.io.verify_folder import check_merged_folder
    from lorafa.runs.adapters import adapter_in, run_in

    folders = [adapter_in(name) for name in args.adapters]
    runs = [run for name in args.adapters if (run := run_in(name)) is not None]
    base = args.base or next((run.config().model.name for run in runs), None)
    shown = Screen(stderr=True, quiet=console.quiet)
    with _bar(shown) as bar:
        merged = merge_to_folder(
            folders,
            args.out,
            base=base,
            dtype=args.dtype,
            max_shard_size=args.max_shard_size,
            overwrite=args.overwrite,
            ignore_base_mismatch=args.ignore_base_mismatch,
            trust_remote_code=args.trust_remote_code,
            progress=bar,
        )
    files = "1 file" if merged.files == 1 else f"{merged.files} files"
    said = f"{merged.folder}: {merged.nbytes / 1e6:.1f} MB in {files}, {merged.changed} weights changed."
    console.print(said, highlight=False, markup=False, soft_wrap=True)
    if args.verify:
        with shown.status("Comparing outputs"):
            check = check_merged_folder(
                merged.folder, folders, base=base, ignore_base_mismatch=args.ignore_base_mismatch,
                trust_remote_code=args.trust_remote_code,
            )  # fmt: skip
        console.print(f"Verified: {check}.", highlight=False, markup=False, soft_wrap=True)
        check.require_explained()
    return 0


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes while the block runs; gives ``update(done, total)``."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        *(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:

        def update(done: int, total: int) -> None:
            if not progress.task_ids:  # nothing is shown of what is refused before it begins
                progress.add_task("merging")
            progress.update(progress.task_ids[0], completed=done, total=total)

        yield update
