"""The packages lorafa works with: which versions, what each is for, and what is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from lorafa.diagnosis.finding import Bench, Finding, State
from lorafa.diagnosis.releases import is_older


@dataclass(frozen=True, kw_only=True)
class Package:
    """A distribution, as pip calls it."""

    name: str
    least: str
    """The oldest version that lorafa is tested with; "" where none is claimed."""
    below: str = ""
    """The first one it does not; "" where there is none yet."""
    module: str = ""
    """What is imported; "" where it is called like the distribution."""
    proof: tuple[str, ...] = ()
    """What is imported to see that it works, "module" or "module=name"; its module where there is nothing here."""
    extra: str | None = None
    """The extra of lorafa it comes with: "" with the library itself, None with none."""
    gives: str = ""
    """What it is for, where nothing comes with it."""
    tried: bool = True
    """Whether it is imported to see that it works."""

    @property
    def imported(self) -> str:
        return self.module or self.name

    @property
    def needed(self) -> bool:
        """Whether training needs it."""
        return self.extra is not None

    @property
    def jobs(self) -> tuple[str, ...]:
        """The trials of it."""
        return tuple(f"use:{proof}" for proof in self.proof or (self.imported,))

    @property
    def requirement(self) -> str:
        """As pip takes it, in the quotes of a shell."""
        ends = [f">={self.least}" if self.least else "", f"<{self.below}" if self.below else ""]
        return f"'{self.name}{','.join(filter(None, ends))}'"


PACKAGES = (
    Package(name="torch", least="2.6", extra=""),
    Package(name="safetensors", least="0.7.0", extra="", proof=("safetensors.torch",)),
    Package(name="numpy", least="2.0", extra=""),
    Package(name="regex", least="2023.12.25", extra=""),
    Package(
        name="transformers", least="5.2", below="6", extra="train",
        proof=("transformers=AutoTokenizer", "transformers=AutoModelForCausalLM", "transformers=Trainer"),
    ),
    Package(name="accelerate", least="1.4", extra="train"),
    Package(name="datasets", least="3.0", extra="train"),
    Package(name="filelock", least="3.20.3", extra="train"),
    Package(name="hydra-core", least="1.3.1", extra="train", module="hydra"),
    Package(name="pyyaml", least="6.0", extra="train", module="yaml"),
    Package(name="rich", least="13.8", extra="train"),
    Package(name="matplotlib", least="3.9", extra="train"),
    Package(name="jinja2", least="3.1.6", extra="train"),
    Package(name="gguf", least="0.17.1", extra="train"),
    Package(name="bitsandbytes", least="0.45", gives="model.quantize=bnb4 and bnb8"),
    Package(name="torchao", least="0.14", gives="model.quantize=torchao_int8"),
    Package(
        name="trl", least="1.16.0", below="1.17", proof=("trl=SFTTrainer", "trl=DPOTrainer"),
        gives="preferences and rewards (objective=dpo ...), TRL's trainers under `lorafa run`",
    ),
    Package(name="tensorboard", least="2.18", gives="report_to=tensorboard"),
    Package(name="wandb", least="0.19", gives="report_to=wandb"),
    Package(name="trackio", least="", gives="report_to=trackio"),
    Package(name="mlflow", least="", gives="report_to=mlflow"),
    Package(
        name="hydra-joblib-launcher", least="1.2", module="hydra_plugins.hydra_joblib_launcher",
        gives="hydra/launcher=joblib: runs of `lorafa train -m` at the same time",
    ),
    Package(name="peft", least="0.21.2", gives="nothing: lorafa takes its place", tried=False),
)  # fmt: skip
"""A test holds the versions against pyproject.toml."""
BY_NAME = {package.name: package for package in PACKAGES}


def of_extra(extra: str) -> tuple[Package, ...]:
    """The packages of an extra; "" has those of the library itself."""
    return tuple(package for package in PACKAGES if package.extra == extra)


def installed_version(name: str) -> str | None:
    """The version of a distribution that is installed; None where none is, or where its record cannot be read."""
    try:
        return metadata.version(name) or None
    except Exception:  # a record of an installation that was broken off
        return None


def is_findable(module: str) -> bool:
    """Whether Python finds a module of that name, without importing it."""
    try:
        return find_spec(module.partition(".")[0]) is not None
    except Exception:  # who finds modules may be anybody's code
        return False


def is_there(package: Package) -> bool:
    """Whether a package is installed, or its module is somewhere on Python's path."""
    return installed_version(package.name) is not None or is_findable(package.imported)


def packages(bench: Bench) -> Iterator[Finding]:
    """Each package that is needed, or that is there; those that are neither stand with what they would give."""
    for package in PACKAGES:
        if package.needed or is_there(package):
            yield _found(package, bench)


def works(package: Package, bench: Bench) -> bool:
    """Whether a package is there, of a version that is claimed, and can be imported."""
    return _found(package, bench).state in ("ok", "note")


def way_to_install(package: Package) -> str:
    """The command that installs a package that is not there."""
    extra = {None: package.requirement, "": "lorafa"}.get(package.extra, f"'lorafa[{package.extra}]'")
    return f"pip install {extra}"


def _found(package: Package, bench: Bench) -> Finding:
    version = installed_version(package.name)
    facts = {"version": version, "least": package.least, "below": package.below or None, "extra": package.extra}

    def finding(state: State, said: str, remedy: str = "") -> Finding:
        return Finding(
            subject=package.name, state=state, said=said, remedy=remedy, needed=package.needed, facts=facts
        )

    if not is_there(package):
        return finding("bad" if package.needed else "no", "not installed", way_to_install(package))
    if version is not None and is_older(version, package.least):
        newer = f"pip install --upgrade {package.requirement}"
        return finding("bad", f"{version} is older than {package.least}, the oldest that lorafa is tested with", newer)
    if version is not None and package.below and not is_older(version, package.below):
        return finding(
            "bad", f"{version} is too new: lorafa works with versions before {package.below}",
            f"pip install {package.requirement}",
        )  # fmt: skip
    named = version or "there, and no record says of which version"
    if not package.tried:
        return finding("ok", named)
    written = ""
    for job in package.jobs:
        made = bench.outcome(job)
        if made is None:
            continue
        if made.error is not None:
            again = f"pip install --force-reinstall {package.requirement}"
            return finding("bad", f"{named}, and cannot be imported: {made.error}", again)
        written = written or made.first_written()
    if written:
        return finding("note", f"{named}; it writes when it is imported: {written}")
    return finding("ok" if version else "note", named)
