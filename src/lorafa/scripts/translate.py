"""What a published command asks for, as settings of `lorafa train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafa.conf.compose import quoted
from lorafa.data import data_set_names, data_set_of
from lorafa.errors import ConfigError, NotAvailableError, did_you_mean
from lorafa.scripts.asked import PAGE, Asked
from lorafa.scripts.published import IMAGES, KINDS_OF_TYPES, PUBLISHED_KEYS
from lorafa.settings.checks import check_choice, check_flag, check_int, check_number, found

Settings = dict[str, Any]
"""Our settings by name; a choice of a group has the group's name alone."""

FIXED: Mapping[str, Any] = {
    "model": "custom",
    "data": "custom",
    "peft": "lora",
    "eval": "loss",
    "optim": "adamw",
    "data.template": "spaced",
    "optim.schedule": "linear",
    "optim.warmup": 100,
    "optim.shorten_warmup": True,
    "train.steps": None,
    "train.group_by_length": False,
    "train.checkpoint_every": 0,
    "train.checkpoint_epochs": 1,
    "eval.before": False,
}
"""What the published training has in its code, and no key for."""
INSTEAD: Mapping[str, str] = {
    "train.steps": "train.epochs",
    "train.eval_every": "train.eval_epochs",
    "train.checkpoint_every": "train.checkpoint_epochs",
}
"""Our setting, where it is given -> the one that is not set then."""
SEED, DATASET = 42, "meta_math"
DIRECTIONS: Mapping[str, str] = {"LoRA-GA": "ArB2r"}
"""Directions by the name a version of the scripts has for them -> the usual one."""


@dataclass(frozen=True)
class Translated:
    """A command as one of `lorafa train`."""

    overrides: list[str]
    notes: list[str]
    """Keys that change nothing, each with the reason."""
    dry_run: bool


def translate(asked: Asked, processes: int = 1) -> Translated:
    """The settings that mean what the keys meant.

    Args:
        processes: of the training together, which share ``model.real_batch_size``.

    Raises:
        ConfigError: a value has the wrong type or range, or two contradict each other.
        NotAvailableError: it asks for what is not here.
    """
    settings: Settings = dict(FIXED)
    unread = {key for key in asked.given if PUBLISHED_KEYS[key].dead}
    for part in (_run, _model, _adapter):
        settings |= part(asked, processes)
    if _flag(asked, "peft.use_peft", True):
        start = _start(asked)
        settings |= start
        unread |= {key for key in asked.given if key.startswith("init.") and key not in _READ[asked.get("init.mode")]}
        if asked.get("init.scale", "") != "stable":
            unread |= asked.given & {"init.stable_gamma"}
        if "norm_clip" not in " ".join(start):
            unread |= asked.given & {"init.norm_clip"}
    else:
        unread |= {key for key in asked.given if key.startswith(("init.", "peft.")) and key != "peft.use_peft"}
    for text in asked.ours:
        settings.pop(INSTEAD.get(text.lstrip("+").partition("=")[0], ""), None)
    notes = [f"{key}={asked.values[key]} changes nothing: {_why(key, asked)}." for key in sorted(unread)]
    overrides = [f"{name}={_written(name, value)}" for name, value in settings.items()]
    return Translated([*overrides, *asked.ours], notes, _flag(asked, "dry_run", False))


def _why(key: str, asked: Asked) -> str:
    if PUBLISHED_KEYS[key].dead:
        return PUBLISHED_KEYS[key].means
    if not asked.get("peft.use_peft", True):
        return "there is no adapter with peft.use_peft=false"
    if key == "init.stable_gamma" and key in _READ[asked.get("init.mode")]:
        return f"it is the gamma of init.scale=stable, and that is {asked.get('init.scale', 'default')}"
    if key == "init.norm_clip":
        return "this start takes nothing out of the base"
    return f"+init={asked.choices['init']} does not read it"


# ---- the run --------------------------------------------------------------------------------------------------------


def _run(asked: Asked, processes: int) -> Settings:
    passed = {name: key.passed for name, key in PUBLISHED_KEYS.items() if name in asked.values}
    settings: Settings = {ours: asked.values[name] for name, ours in passed.items() if ours is not None}
    settings |= {"data.name": _data_set(str(asked.get("dataset_name", DATASET)))}
    settings.setdefault("train.seed", SEED)
    if "report_project" in settings:
        settings["report_project"] = str(settings["report_project"])
    settings.setdefault("train.save_merged", True)
    if (name := asked.get("wandb.name")) is not None:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            raise ConfigError(
                f"wandb.name={name} is the name of a run, whose directory is runs/<name>. Give a name without '..', or "
                "run_dir=<folder>."
            )
        settings["run_dir"] = str(Path("runs") / path)
    return settings


def _data_set(name: str) -> str:
    if name in IMAGES:
        raise NotAvailableError(
            f"dataset_name={name} is a data set of images, and run_exp.py trains language models. Give one of text, or "
            "dataset_name=<file.jsonl>."
        )
    if data_set_of(name) is None:
        known = data_set_names()
        raise ConfigError(
            f"There is no data set {name!r}.{did_you_mean(name, known)} Give dataset_name=<file.jsonl>, a Hub id, or "
            f"one of: {', '.join(known)}."
        )
    return name


def _model(asked: Asked, processes: int) -> Settings:
    check_choice("model.type", asked.get("model.type"), KINDS_OF_TYPES)
    kind = KINDS_OF_TYPES[asked.get("model.type")]
    of_kind = {} if kind is None else {"model.kind": kind, "data.template": None}  # its two texts lie apart
    real, each = asked.get("model.real_batch_size"), asked.get("model.per_device_batch_size")
    check_int("model.real_batch_size", real, at_least=1)
    check_int("model.per_device_batch_size", each, at_least=1)
    together = each * processes
    if real % together:
        share = f"{each}" if processes == 1 else f"{each} on each of {processes} processes"
        raise ConfigError(
            f"model.real_batch_size={real} is no multiple of model.per_device_batch_size={share}, so no whole number "
            f"of passes makes a step. Give a multiple of {together}."
        )
    epochs = asked.get("model.eval_epochs")
    if epochs is not None:
        check_number("model.eval_epochs", epochs, "a number > 0, or null", 0)
    return {
        "model.dtype": "bfloat16" if _flag(asked, "model.bf16", True) else "float32",
        "train.batch_size": each,
        "train.accumulation": real // together,
        "eval.batch_size": each,
        "train.eval_epochs": epochs,
        "train.keep_checkpoints": max(1, int(epochs or 1)),
        **of_kind,
    }


# ---- the adapter ----------------------------------------------------------------------------------------------------


def _adapter(asked: Asked, processes: int) -> Settings:
    if _flag(asked, "peft.adalora", False):
        raise NotAvailableError("AdaLoRA, whose ranks change while it trains, is not here. Take +peft=all or +peft=qv.")
    if not _flag(asked, "peft.use_peft", True):
        return {"peft": "full_ft", "train.save_merged": False}  # the model is saved anyway
    settings: Settings = {
        "peft.r": _rank(asked),
        "peft.target_modules": _targets(asked.get("peft.lora_target_modules")),
        "peft.lora_alpha": asked.get("peft.lora_alpha"),
        "peft.lora_dropout": asked.get("peft.lora_dropout", 0.0),
        "peft.use_rslora": asked.get("peft.use_rslora", False),
        "peft.use_dora": _flag(asked, "peft.dora", False),
        "peft.modules_to_save": ["lm_head"] if _flag(asked, "peft.train_embeddings", False) else None,
    }
    if _flag(asked, "peft.use_loraplus", False):
        settings |= {"optim": "lora_plus", "optim.lr_ratio": asked.get("peft.loraplus_lr_ratio")}
    return settings


def _targets(given: Any) -> Any:
    if given is None:
        raise ConfigError(
            "peft.lora_target_modules is null, so nothing would be adapted. Give all, a list of names, or "
            "++peft.use_peft=false."
        )
    return "all-linear" if given == "all" else [given] if isinstance(given, str) else given


def _rank(asked: Asked) -> int:
    rank, relative = asked.get("peft.lora_r"), asked.get("peft.lora_relative_r")
    if (rank is None) == (relative is None):
        now = "neither is" if rank is None else f"peft.lora_r={rank} and peft.lora_relative_r={relative} both are"
        raise ConfigError(
            f"One of peft.lora_r and peft.lora_relative_r says what the rank is, and {now} set. Give exactly one, for "
            "example ++peft.lora_r=8."
        )
    if relative is None:
        check_int("peft.lora_r", rank, at_least=1)
        return int(rank)
    check_number("peft.lora_relative_r", relative, "a number in (0, 1]", 0, 1, closed="]")
    side = _first_side(asked.get("model.name"), KINDS_OF_TYPES.get(asked.get("model.type")))
    if int(side * relative) < 1:
        raise ConfigError(f"peft.lora_relative_r={relative} of {side} is a rank below 1. Give at least {1 / side:.3g}.")
    return int(side * relative)


def _first_side(name: str, kind: str | None) -> int:
    """The smaller side of the model's first linear layer; the model is made without its weights."""
    from torch import nn

    from lorafa.models.kinds import AUTO
    from lorafa.models.shapes import shape_model

    model = shape_model(name, kind=kind or AUTO)
    return next(min(layer.weight.shape) for layer in model.modules() if isinstance(layer, nn.Linear))


# ---- the start ------------------------------------------------------------------------------------------------------


def _start(asked: Asked) -> Settings:
    mode, dtype = asked.get("init.mode"), asked.get("init.dtype", "fp32")
    check_choice("init.mode", mode, _STARTS)
    if dtype != "fp32":
        raise NotAvailableError(f"Adapters are trained in float32 here, found init.dtype={dtype}. Drop it.")
    return _STARTS[mode](asked)


def _simple(asked: Asked) -> Settings:
    """Both factors by a sampler; with B = 0 and the usual A the start of LoRA itself, where nothing is taken out."""
    if (asked.get("init.lora_A"), asked.get("init.lora_B")) == ("kaiming", "zeros") and _scale(asked) == "default":
        return {"init": "default"}
    settings: Settings = {"init": "both_random", "init.lora_A": asked.get("init.lora_A")}
    settings |= {"init.lora_B": asked.get("init.lora_B"), "init.scale": _scale(asked)}
    for factor in ("lora_A", "lora_B"):
        if asked.get(f"init.{factor}") == "gaussian":
            std = asked.get(f"init.{factor}_std")
            if std is None:
                raise ConfigError(f"init.{factor}=gaussian needs a standard deviation. Add ++init.{factor}_std=0.02.")
            settings[f"init.{factor}_std"] = std
    return settings | _gamma(asked) | _clip(asked)


def _svd(asked: Asked) -> Settings:
    return {"init": "svd_of_weight", "init.scale": _scale(asked)} | _gamma(asked) | _clip(asked)


def _gradient(asked: Asked) -> Settings:
    direction = asked.get("init.direction")
    settings: Settings = {"init": "gradient", "init.direction": DIRECTIONS.get(direction, direction)}
    settings |= {f"init.{name}": asked.get(f"init.{name}") for name in ("scale", "bsz", "iters", "max_length")}
    takes_out = settings["init.direction"] not in ("LoRA-One", "LoRA-FA")
    return settings | _gamma(asked) | (_clip(asked) if takes_out else {})


def _scale(asked: Asked) -> str:
    return str(asked.get("init.scale", "default"))


def _gamma(asked: Asked) -> Settings:
    return {"init.stable_gamma": asked.get("init.stable_gamma")} if _scale(asked) == "stable" else {}


def _clip(asked: Asked) -> Settings:
    return {"init.norm_clip": _flag(asked, "init.norm_clip", False)}


_STARTS: Mapping[str, Callable[[Asked], Settings]] = {"simple": _simple, "svd": _svd, "gradient": _gradient}
_ALL = ("init.mode", "init.scale", "init.stable_gamma", "init.norm_clip", "init.dtype", "init.weight")
_READ: Mapping[str, tuple[str, ...]] = {
    "simple": (*_ALL, "init.lora_A", "init.lora_B", "init.lora_A_std", "init.lora_B_std"),
    "svd": _ALL,
    "gradient": (*_ALL, "init.direction", "init.bsz", "init.iters", "init.max_length"),
}
"""Mode of a start -> the keys it has a use for."""


# ---- values ---------------------------------------------------------------------------------------------------------


def _flag(asked: Asked, key: str, default: bool) -> bool:
    value = asked.get(key, default)
    check_flag(key, value)
    return bool(value)


def _written(name: str, value: Any) -> str:
    """A value as it is typed on the command line; an option of a group as it is."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return quoted(value) if "." in name or name in ("run_dir", "report_project") else value
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_written(f"{name}.", item) for item in value) + "]"
    if isinstance(value, (int, float)):
        return repr(value)
    raise ConfigError(f"{name} has a value that no published command has: {found(value)}. {PAGE} lists the keys.")
