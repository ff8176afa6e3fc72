"""`lorafa combine`: several adapters made one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lorafa.cli.trusted import add_trust

if TYPE_CHECKING:
    from rich.console import Console

    from lorafa.surgery.combination import Combination
    from lorafa.surgery.combining import Combining

TYPES = (
    *("svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
)

DESCRIPTION = """\
Combine adapters of one base model to a new adapter, with one weight each, and say what its rank cannot hold.

The result is plain LoRA with the scaling 1, in PEFT's format, on every layer one of the adapters is on. The base model
is not loaded, unless an adapter is a change of its weights (DoRA), is on parameters (experts of mixtures), or does not
hold its start (PiSSA as PEFT saves it): then it is the one of --base, or the one that the adapters name.

types:
  cat                  the exact weighted sum; its rank is the sum of all ranks
  svd                  the nearest update to that sum of rank --rank, or of the largest rank of the adapters (default)
  linear               A with A and B with B, as PEFT does: has products of one adapter's B with another one's A
  ties, dare_linear, dare_ties, magnitude_prune
                       A with A and B with B, of which --density of the entries are kept
  ..._svd              the same with the updates themselves as matrices, brought to rank --rank"""

EXAMPLES = """\
examples:
  lorafa combine sql poems --weights 0.7 0.3 --out both
  lorafa combine sql poems --weights 1 -0.5 --type cat --out sql-without-poems
  lorafa combine runs/a runs/b --out both
  lorafa combine a b c --weights 1 1 1 --type ties_svd --density 0.3 --rank 16 --out merged
  lorafa combine dora-a dora-b --weights 0.5 0.5 --base path/to/model --out merged

exit status: 0 done, 1 the adapters do not go together, or a file cannot be read or written, 2 wrong arguments. Nothing
is written unless all is well"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "combine",
        help="make one adapter of several, with a weight each",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="folder or Hub id of an adapter, or a run directory"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the result; what is there must be empty"
    )
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one an adapter (default: 1 each)")
    parser.add_argument("--type", default="svd", choices=TYPES, metavar="TYPE", help="see above (default: svd)")
    parser.add_argument("--rank", type=int, metavar="R", help="rank of the types that end in svd")
    parser.add_argument("--density", type=float, metavar="D", help="share of entries that pruning keeps, in (0, 1]")
    parser.add_argument(
        "--majority", default="total", metavar="HOW", help="how TIES elects signs: total (default) or frequency"
    )
    parser.add_argument("--clamp", type=float, metavar="Q", help="clamp the factors of an svd to this quantile")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="what DARE draws from (default: 0)")
    parser.add_argument(
        "--base", metavar="MODEL", help="combine on this base model, and check that it is the right one"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_trust(parser)
    return parser


def run(args: argparse.Namespace, console: Console) -> int:
    from lorafa.io.combine_files import combine_files, why_base
    from lorafa.runs.adapters import adapter_in
    from lorafa.storage.folders import require_free
    from lorafa.surgery.combining import Combining, check_weights

    weights = [1.0] * len(args.adapters) if args.weights is None else args.weights
    asked = Combining(
        args.type,
        svd_rank=args.rank,
        svd_clamp=args.clamp,
        density=args.density,
        majority_sign_method=args.majority,
        seed=args.seed,
    )
    check_weights(args.adapters, weights)
    require_free(args.out, overwrite=None)
    adapters = [adapter_in(name) for name in args.adapters]
    if args.base is None and why_base(adapters) is None:
        made = combine_files(adapters, weights, args.out, asked)
    else:
        made = _on_base(args.base, adapters, weights, args.out, asked, trusted=args.trust_remote_code)
    _say(made, args.json, console)
    return 0


def _on_base(
    base: str | None, adapters: list[str], weights: list[float], out: str, asked: Combining, *, trusted: bool
) -> Combination:
    """Combine on the base model that is given, or on the one that the adapters name."""
    from lorafa.auto import load_base
    from lorafa.io.combine_files import combine_on_base, require_one_named_base
    from lorafa.models.load import resolve_model

    if base is None:
        require_one_named_base(adapters)
    place = None if base is None else resolve_model(base)
    model = load_base(adapters[0], place, trust_remote_code=trusted)
    return combine_on_base(model, adapters, weights, out, asked)


def _say(made: Combination, as_json: bool, console: Console) -> None:
    """What was written, and the layers that lost most."""
    if as_json:
        layers = {
            name: {"rank": error.rank, "energy": error.energy, "lost": error.lost, "relative": error.relative}
            for name, error in made.layers.items()
        }
        console.print_json(data={
            "adapter": made.adapter_name, "type": made.combination_type, "energy": made.energy, "lost": made.lost,
            "relative": made.relative, "layers": layers,
        })  # fmt: skip
        return
    console.print(str(made), highlight=False, markup=False, soft_wrap=True)
    if made.lost:
        for name, error in made.worst(5):
            console.print(f"  {error.relative:8.2%}  {name}", highlight=False, markup=False, soft_wrap=True)
