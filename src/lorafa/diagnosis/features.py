"""What works here, and what would have to be installed for the rest."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lorafa.diagnosis.finding import Bench, Finding, State
from lorafa.diagnosis.packages import BY_NAME, Package, is_findable, is_there, of_extra, way_to_install, works
from lorafa.errors import shorten
from lorafa.export import EXPORTERS
from lorafa.models import QUANTIZERS
from lorafa.train.trackers import TRACKERS


@dataclass(frozen=True)
class Feature:
    """Something that may be asked of lorafa."""

    name: str
    """As it is asked for."""
    package: str = ""
    """What it needs beside that which training needs; "" where it needs nothing."""
    job: str = ""
    """The trial that shows it; "" where importing the package does."""
    system: Callable[[], str] = lambda: ""
    """What stands in its way on this system, whatever is installed; "" where nothing does."""
    remedy: str = ""
    """What to do where its trial fails, or the system is in its way."""


def _no_compiler() -> str:
    named = os.environ.get("CXX")
    found = [name for name in ([named] if named else ["g++", "clang++", "c++", "cl"]) if shutil.which(name)]
    return "" if found else "there is no compiler of C++, which products on a processor are compiled with"


def _no_pip() -> str:
    return "" if is_findable("pip") else "its model is fetched by pip, which this Python does not have"


def _no_limits() -> str:
    return "" if os.name == "posix" else f"programs cannot be limited on this system ({sys.platform})"


def _no_ports() -> str:
    try:
        with socket.socket() as door:
            door.bind(("127.0.0.1", 0))
    except OSError as error:
        return f"no port of this machine can be opened: {error.strerror or error}"
    return ""


QUANTIZED = {"bnb4": "bitsandbytes", "bnb8": "bitsandbytes", "torchao_int8": "torchao"}
"""Ways to quantize that need a package."""
WRITTEN_BY = {"gguf": "gguf", "ollama": "gguf"}
"""Targets of an export that need a package."""

FEATURES = (
    Feature(
        "lorafa train, without model=", system=_no_pip,
        remedy="python -m ensurepip; or name a model: model=path/to/model",
    ),
    *(Feature(f"model.quantize={way}", QUANTIZED.get(way, ""), f"quantize:{way}") for way in QUANTIZERS.names()),
    *(Feature(f"lorafa export --for {name}", WRITTEN_BY.get(name, ""), f"export:{name}") for name in EXPORTERS.names()),
    *(Feature(f"report_to={name}", name, f"track:{name}") for name in TRACKERS.names()),
    Feature("objective=dpo, orpo, kto, reward, grpo", "trl"),
    Feature("TRL's trainers under `lorafa run`", "trl"),
    Feature("lorafa train -m hydra/launcher=joblib", "hydra-joblib-launcher"),
    Feature("lorafa chat --serve", system=_no_ports, remedy="see what forbids it: a sandbox, a firewall"),
    Feature("task=humaneval", system=_no_limits, remedy="measure on Linux or macOS"),
    Feature("torch.compile", system=_no_compiler, remedy="install one (Debian: apt-get install g++), or set CXX"),
)  # fmt: skip


def jobs() -> list[str]:
    """All trials that the checks ask for, in the order in which they are made."""
    there = [package for package in BY_NAME.values() if package.tried and is_there(package)]
    needed = [job for package in there if package.needed for job in package.jobs]
    others = [job for package in there if not package.needed for job in package.jobs]
    tried = [feature.job for feature in FEATURES if feature.job and _is_worth_a_trial(feature)]
    return ["peft_is_there", "served", *needed, *others, "devices", "speeds", "threads", "step", "commands", *tried]


def _is_worth_a_trial(feature: Feature) -> bool:
    return not feature.package or is_there(BY_NAME[feature.package])


def training(bench: Bench) -> Iterator[Finding]:
    """Whether an adapter trains, and whether the commands come up."""
    library = [package.name for package in of_extra("") if not works(package, bench)]
    rest = [package.name for package in of_extra("train") if not works(package, bench)]
    yield _shown(bench, "the library", "step", library, "an adapter on a tiny model learns in three steps")
    yield _shown(bench, "the commands", "commands", [*library, *rest], "all that `lorafa train` imports is there")


def _shown(bench: Bench, subject: str, job: str, lacking: list[str], shown: str) -> Finding:
    made = bench.outcome(job)
    if lacking:
        said = f"not without {shorten(lacking, 8)}: see above"
        return Finding(subject=subject, state="bad", said=said, needed=True, facts={"lacking": lacking})
    if made is None:
        return Finding(subject=subject, state="ok", said="the packages are there; nothing was tried", needed=True)
    if made.error is not None:
        return Finding(
            subject=subject, state="bad", said=made.error, needed=True, facts={"written": made.written},
            remedy="if the packages above are in order, this is lorafa's: --json has what was written",
        )  # fmt: skip
    return Finding(subject=subject, state="ok", said=shown, needed=True)


def features(bench: Bench) -> Iterator[Finding]:
    """What else works, one line a feature."""
    for feature in FEATURES:
        yield _of(feature, bench)


def _of(feature: Feature, bench: Bench) -> Finding:
    def finding(state: State, said: str, remedy: str = "") -> Finding:
        facts = {"package": feature.package or None}
        return Finding(subject=feature.name, state=state, said=said, remedy=remedy, facts=facts)

    package: Package | None = BY_NAME[feature.package] if feature.package else None
    if package is not None and not is_there(package):
        return finding("no", f"needs {package.name}", way_to_install(package))
    if package is not None and not works(package, bench):
        return finding("bad", f"needs {package.name}, which is not in order: see above")
    if lacking := [each.name for each in of_extra("") if not works(each, bench)]:
        return finding("bad", f"needs {shorten(lacking)}, which lorafa itself needs: see above")
    if in_the_way := feature.system():
        return finding("no", in_the_way, feature.remedy)
    made = bench.outcome(feature.job) if feature.job else None
    if made is not None and made.error is not None:
        return finding("bad", made.error, feature.remedy)
    return finding("ok", "works" if made is not None else "nothing is in its way")
