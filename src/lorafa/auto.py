"""Base and adapter at once: the adapter's config names the base model, which transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from lorafa.config import LoraConfig
from lorafa.errors import ConfigError, SourceError, first_line
from lorafa.io.find import AdapterFiles, find_adapter_files
from lorafa.io.load import LoadOptions
from lorafa.models.sourced import refused_code
from lorafa.peft_model import PeftModel
from lorafa.settings.methods import TaskType
from lorafa.storage.hub import HubOptions, locate
from lorafa.storage.paths import user_path
from lorafa.surgery.given import lora_config
from lorafa.surgery.walk import embedding_of

_LOADERS = {
    TaskType.CAUSAL_LM: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION: "AutoModel",
}
_OF_THE_BASE = {"dtype", "torch_dtype", "device_map", "max_memory", "offload_folder", "offload_buffers"}
_OF_BOTH = HubOptions.__optional_keys__ - {"revision", "use_auth_token"} | {"trust_remote_code"}
_OF_THE_ADAPTER = LoadOptions.__optional_keys__ - _OF_THE_BASE - _OF_BOTH | {
    *("autocast_adapter_dtype", "ephemeral_gpu_offload", "low_cpu_mem_usage", "key_mapping", "torch_device"),
}


class AutoPeftModel:
    """Loads a model by the task its adapter was made for (``task_type``), or by the class its config names."""

    task: ClassVar[TaskType | None] = None
    """What the base is loaded for; None goes by the adapter's config."""

    def __init__(self) -> None:
        raise ConfigError(f"{type(self).__name__} is not made, but loaded: call its from_pretrained.")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load the base model that an adapter names, and put the adapter on it.

        Where a tokenizer lies beside the adapter and knows more tokens than the base has rows, the base is resized.

        Args:
            pretrained_model_name_or_path: folder or Hub repository of the adapter.
            adapter_name, is_trainable, config: as for :meth:`lorafa.PeftModel.from_pretrained`.
            revision: that of the adapter; its config has the base's.
            import_allowlist: packages that a class named in the config may come from. It is transformers alone, and
                not even that where the list does not have it.
            kwargs: those of :class:`lorafa.io.load.LoadOptions` that are about the adapter; ``dtype``, ``device_map``
                and everything else goes to the base model's ``from_pretrained``; those about the Hub, and
                ``trust_remote_code``, to both.

        Raises:
            ConfigError: another program wrote the adapter, in a layout of its own; the config names no base, or
                neither a task nor a class of transformers; or the task that it names is not this class's.
            SourceError: the adapter or the base cannot be found or loaded.
            LoraError: as :meth:`lorafa.PeftModel.from_pretrained`.
        """
        shared = {name: kwargs[name] for name in kwargs if name in _OF_BOTH}
        own = {name: kwargs[name] for name in kwargs if name in _OF_THE_ADAPTER}
        rest = {name: value for name, value in kwargs.items() if name not in own}
        if (token := rest.pop("use_auth_token", None)) is not None:
            shared["token"] = rest["token"] = token
        hub: Any = {name: value for name, value in shared.items() if name != "trust_remote_code"} | {
            "revision": revision
        }
        place: dict[str, Any] = {"subfolder": own.get("subfolder")}
        if config is None:
            place["weight_name"] = own.get("weight_name")
            given = _require_peft(find_adapter_files(pretrained_model_name_or_path, **place, **hub))
        else:
            given = lora_config(config)
        rest["trust_remote_code"] = trusted = bool(rest.get("trust_remote_code", False))  # None would ask on a prompt
        base = _base_model(cls._loader(given, import_allowlist), given, rest)
        _resize(base, pretrained_model_name_or_path, place["subfolder"], hub, trusted=trusted)
        return PeftModel.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **own, **hub
        )

    @classmethod
    def _loader(cls, config: LoraConfig, allowed: Sequence[str] | None = None) -> str:
        """The name of transformers' class that loads the base.

        Raises:
            ConfigError: the adapter was made for another task, or it is not known what for.
        """
        if cls.task is not None and isinstance(config.task_type, TaskType) and config.task_type is not cls.task:
            right = next(one for one in AutoPeftModel.__subclasses__() if one.task is config.task_type)
            raise ConfigError(
                f"The adapter was made for {config.task_type.value}, and {cls.__name__} loads its base for "
                f"{cls.task.value}, which would give it a head it was not trained with. Use {right.__name__}, or load "
                "the base and call PeftModel.from_pretrained(base, path)."
            )
        task, made_for = cls.task or config.task_type, config.auto_mapping or {}
        if isinstance(task, TaskType):
            return _LOADERS[task]
        library = str(made_for.get("parent_library", ""))
        if library.partition(".")[0] == "transformers" and _is_among(library, allowed):
            return str(made_for.get("base_model_class"))
        raise ConfigError(
            "The adapter's config has no task_type and names no class of transformers, so what to load its base as "
            f"cannot be told (auto_mapping={config.auto_mapping!r}, import_allowlist={allowed!r}). Use "
            "AutoPeftModelForCausalLM or another class for a task, or load the base and call PeftModel.from_pretrained("
            "base, path)."
        )


def _is_among(module: str, packages: Sequence[str] | None) -> bool:
    return packages is None or any(f"{module}.".startswith(f"{package}.") for package in packages)


def _require_peft(files: AdapterFiles) -> LoraConfig:
    if (config := files.peft_config()) is None:
        raise ConfigError(
            f"{files.weights} is in the layout of another program, which does not say what to load as its base. Load "
            "the base and call PeftModel.from_pretrained(base, path)."
        )
    return config


def load_base(source: str | Path, base: str | Path | None = None, *, trust_remote_code: bool = False) -> Any:
    """The base model of an adapter, as it is stored and in eval mode, without the adapter.

    Args:
        source: folder or Hub repository of the adapter, whose config says what kind of model it is for; where it does
            not, the base's own does.
        base: folder or Hub repository of the base, in place of the one the config names.
        trust_remote_code: run code that comes with the base.

    Raises:
        LoraError: as :meth:`AutoPeftModel.from_pretrained`.
    """
    config = find_adapter_files(source).peft_config() or LoraConfig()
    if base is not None:
        config = replace(config, base_model_name_or_path=str(base), revision=None)
    says = config.task_type is not None or config.auto_mapping is not None
    loader = AutoPeftModel._loader(config) if says else None
    model = _base_model(loader, config, {"dtype": "auto", "trust_remote_code": trust_remote_code}).eval()
    _resize(model, source, None, {}, trusted=trust_remote_code)
    return model


def _base_model(loader: str | None, config: LoraConfig, arguments: dict[str, Any]) -> Any:
    name = config.base_model_name_or_path
    if name is None:
        raise ConfigError(
            "The adapter's config does not name its base model (base_model_name_or_path). Load the base and call "
            "PeftModel.from_pretrained(base, path)."
        )
    try:
        import transformers
    except ImportError as error:
        raise SourceError(
            "Loading a base model needs a package that is not installed. Run: pip install transformers"
        ) from error
    if loader is None:
        loader = _architecture(name, config.revision, trusted=arguments["trust_remote_code"])
    kind = getattr(transformers, loader, None)
    if kind is None:
        raise ConfigError(
            f"The adapter was made for a {loader}, which transformers {transformers.__version__} does not have. Load "
            "the base and call PeftModel.from_pretrained(base, path)."
        )
    try:
        return kind.from_pretrained(name, revision=config.revision, **arguments)
    except (OSError, ConnectionError, ValueError) as error:
        refused = refused_code(error)
        if refused is None and not isinstance(error, OSError):
            raise
        why = refused or (
            f"{first_line(error)}. Load it from where it is and call PeftModel.from_pretrained(base, path)."
        )
        raise SourceError(f"The base model {name!r} that the adapter names could not be loaded: {why}") from error


def _architecture(name: str, revision: str | None, *, trusted: bool) -> str:
    """The class of transformers that a model's own config names."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trusted)
        found = config.architectures
    except (OSError, ValueError, ConnectionError) as error:
        why = refused_code(error) or f"{first_line(error)}. Name another one."
        raise SourceError(f"The base model {name!r} that the adapter names could not be found: {why}") from error
    if trusted and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return "AutoModelForCausalLM"
    return str(found[0]) if found else "AutoModelForCausalLM"


def _resize(model: Any, source: str | Path, subfolder: str | None, hub: Any, *, trusted: bool) -> None:
    """Give the base rows for the tokens that a tokenizer beside the adapter knows and the base does not."""
    try:
        found = locate(source, ["tokenizer_config.json"], subfolder=subfolder, **hub)
    except SourceError as error:
        if error.__cause__ is not None:
            raise
        return  # no tokenizer beside the adapter: that of the base
    from transformers import AutoTokenizer

    place = {"subfolder": subfolder} if subfolder else {}
    local = user_path(source).is_dir()
    where = {} if local else place | hub
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.parent if local else source, trust_remote_code=trusted, **where)
    except ValueError as error:
        if (refused := refused_code(error)) is None:
            raise
        raise SourceError(f"Could not load the tokenizer in {str(source)!r}: {refused}") from error
    table = embedding_of(model, "get_input_embeddings")
    if table is not None and len(tokenizer) > len(table.weight):  # type: ignore[arg-type]
        model.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Loads the base as a causal language model."""

    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Loads the base as an encoder-decoder language model."""

    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Loads the base as a classifier of sequences."""

    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Loads the base as a classifier of tokens."""

    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Loads the base as a model that marks answers in a text."""

    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Loads the base as a model without a head."""

    task = TaskType.FEATURE_EXTRACTION
