"""The finder that answers for `peft`: its modules, and what is said of its version."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from types import ModuleType
from typing import Any

from lorafa.compat.absent import absent
from lorafa.compat.importers import line_that_imported
from lorafa.compat.table import ABSENT, HOMES, MODULES
from lorafa.errors import ConfigError

NAME = "peft"
VERSION = "0.22.0"
"""What is said where somebody asks for the version of `peft`: the least that transformers 5.24 accepts."""
STRICT = "LORAFA_STRICT"
"""An environment variable: where it is set, and not to 0, refusals that PEFT does not have stay errors."""


class _Finder(DistributionFinder):
    """Says where `peft` and the modules below it come from, and which version is installed."""

    def __init__(self, strict: bool) -> None:
        self.lenient = not strict
        """Read by :func:`lorafa.errors.refuse`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        return ModuleSpec(fullname, _Loader(), origin="lorafa", is_package=True)

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        name = getattr(context, "name", None)
        return iter([_Distribution()] if name is None or name.lower() == NAME else [])


class _Loader(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"What scripts find as {module.__name__}: lorafa's objects."
        module.__all__ = list(MODULES[module.__name__])  # type: ignore[attr-defined]
        if module.__name__ == NAME:
            module.__version__ = VERSION  # type: ignore[attr-defined]


class _Module(ModuleType):
    """A module whose names are looked up in the table when they are first asked for."""

    def __getattr__(self, name: str) -> Any:
        inner = f"{self.__name__}.{name}"
        if name in MODULES[self.__name__]:
            value = _counterpart(name)
        elif inner in MODULES:
            value = importlib.import_module(inner)
        else:
            raise AttributeError(f"module {self.__name__!r}, as lorafa serves it, has no {name!r}")
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *MODULES[self.__name__]})


def _counterpart(name: str) -> Any:
    subject = next((subject for subject, names in ABSENT.items() if name in names), None)
    if subject is not None:
        return absent(name, subject)
    module, _, inner = HOMES.get(name, f"lorafa:{name}").partition(":")
    return getattr(importlib.import_module(module), inner)


class _Distribution(Distribution):
    """What ``importlib.metadata`` says of `peft`."""

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\nSummary: lorafa, by PEFT's name\n",
            "top_level.txt": f"{NAME}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        return path


def served() -> bool:
    """Whether ``import peft`` gives lorafa's objects."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def serve(strict: bool | None = None) -> None:
    """Have ``import peft`` give lorafa's objects from now on.

    Args:
        strict: leave refusals that PEFT does not have as they are; None goes by the environment, ``LORAFA_STRICT``.

    Raises:
        ConfigError: another `peft` has been imported already.
    """
    if served():
        return
    if NAME in sys.modules:
        raise ConfigError(
            f"peft itself has been imported already{line_that_imported(NAME)}, and what holds its objects would go on "
            "with them. Import lorafa.compat before anything else, or start the script by `lorafa run`."
        )
    if strict is None:
        strict = os.environ.get(STRICT, "0") not in ("", "0")
    sys.meta_path.insert(0, _Finder(strict))
    importlib.invalidate_caches()
