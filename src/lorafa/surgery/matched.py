"""Which patterns of a config have matched something in a model, and what is said of those that have not."""

from __future__ import annotations

from collections.abc import Collection

from lorafa.config import LoraConfig
from lorafa.errors import TargetError, did_you_mean, refuse, shorten, warn
from lorafa.settings.expressions import fits
from lorafa.surgery.carriers import can_carry
from lorafa.surgery.patterns import key_of
from lorafa.surgery.stacked import meant, stacked_parameters
from lorafa.surgery.walk import Place

ALL_LINEAR = "all-linear"
_INSTEAD = {
    **dict.fromkeys(("target_modules", "target_parameters"), "The adapter is on what the other names mean."),
    "rank_pattern": "It was passed over: the other layers have the ranks that the config says.",
    "alpha_pattern": "It was passed over: the other layers have the alphas that the config says.",
}
"""What is done where a pattern that matches nothing is no error."""


class Patterns:
    """Keeps the books on which patterns have matched."""

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self.used: set[tuple[str, str]] = set()

    def suffix(self, field: str, names: Collection[str], name: str) -> bool:
        """Whether ``name`` is one of ``names`` or ends in a dot and one of them."""
        start = 0
        while True:
            if name[start:] in names:
                self.used.add((field, name[start:]))
                return True
            dot = name.find(".", start)
            if dot < 0:
                return False
            start = dot + 1

    def matches(self, field: str, wanted: Collection[str] | str | None, name: str) -> bool:
        """``wanted`` is a regular expression for the whole name, or a collection of names and dotted ends."""
        if not wanted:
            return False
        if not isinstance(wanted, str):
            return self.suffix(field, wanted, name)
        if fits(field, wanted, name):
            self.used.add((field, wanted))
            return True
        return False

    def lookup(self, field: str, table: dict[str, int] | dict[str, int | float], name: str) -> int | float | None:
        """The value of the first key that is the end of ``name`` or a regular expression for it."""
        key = key_of(table, name, field)
        if key is None:
            return None
        self.used.add((field, key))
        return table[key]

    def report(self, named: list[Place], *, warn_only: bool, found: bool) -> None:
        """Raise for, or warn of, every pattern that has matched nothing.

        Args:
            found: whether others have found layers: by PEFT's name those that have not are then passed over.
        """
        config = self.config
        for field in ("target_modules", "target_parameters", "rank_pattern", "alpha_pattern", "exclude_modules"):
            wanted = getattr(config, field) or ()
            wanted = [wanted] if isinstance(wanted, str) else sorted(wanted)
            unused = [p for p in wanted if (field, p) not in self.used and p.lower() != ALL_LINEAR]
            if not unused:
                continue
            message = _no_match(config, field, unused, named)
            if warn_only or field == "exclude_modules":
                warn(message)
            elif found:
                refuse(TargetError(message), _INSTEAD[field])
            else:
                raise TargetError(message)


def _no_match(config: LoraConfig, field: str, unused: list[str], named: list[Place]) -> str:
    if field == "target_parameters":
        leaves = sorted({n for place in named for n, _ in place.module.named_parameters(recurse=False)})
        kind = "parameters"
    else:
        leaves = sorted({p.name.rpartition(".")[2] for p in named if can_carry(p.module)})
        kind = "layers that can carry an adapter"
    last = unused[0].rpartition(".")[2]
    hint = "" if last in leaves else did_you_mean(last, leaves)
    names = config.target_modules if isinstance(config.target_modules, str) else unused
    stacked = meant(stacked_parameters(named), names) if field == "target_modules" else []
    if stacked:
        hint = (
            f" Layers of that name are stacked in parameters of the experts: name those, target_parameters={stacked!r}."
        )
    if field == "target_modules" and config.layers_to_transform is not None and last in leaves:
        hint = f" It is in none of the layers that layers_to_transform={config.layers_to_transform!r} picks."
    return (
        f"{field}: {', '.join(map(repr, unused))} {'matches' if len(unused) == 1 else 'match'} nothing in the model."
        f"{hint} The last names of its {kind} are: {shorten(leaves, 12) or '(none)'}. A name matches a whole dotted "
        "name or its end after a dot; a single string is a regular expression for the whole name."
    )
