"""LoraConfig: what to adapt and how. Fields, order and defaults are those of PEFT 0.21.2, and so is the json."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from lorafa.adapter import scaling
from lorafa.errors import ConfigError, NotAvailableError, did_you_mean, refuse, shorten
from lorafa.initializers import Start, known_start
from lorafa.initializers.settings import (
    NO_SETTINGS,
    START_SETTINGS,
    settings_class,
    settings_field,
    start_meant,
)
from lorafa.settings.checks import (
    check_arguments,
    check_flag,
    check_int,
    check_text,
    index_ranges,
    indices,
    is_int,
    member,
    name_table,
    names,
    path_text,
    plain,
    shown,
)
from lorafa.settings.fields import (
    Form,
    check_fields,
    check_forms,
    check_mapping,
    check_pattern,
    check_settings,
    check_tokens,
    name_list,
    name_set,
    number,
    one_of,
    optional,
    patterns_to,
    rank_of_adapter,
    setting,
    take_forms,
    whole,
)
from lorafa.settings.methods import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    PeftType,
    TaskType,
    VeloraConfig,
    as_written,
    from_nested,
)
from lorafa.storage.hub import HubOptions, UploadOptions, locate, uploaded
from lorafa.storage.whole import make_folder, read_json, write_json
from lorafa.variants import variant_types
from lorafa.version import VERSION

if TYPE_CHECKING:
    from typing_extensions import Unpack

CONFIG_NAME = "adapter_config.json"
LORAFA_ONLY = ("freeze_A", "init_seed", "attention_out_proj_twice", "init_config")
"""The fields PEFT does not have. In an adapter's files they are in the header of the tensors: PEFT warns of them."""
BIASES = ("none", "all", "lora_only")
_ALPHA = number("a number > 0 that float32 can scale by (1e-30 to 1e30)", 1e-30, 1e30, closed="[]")


def _copied(name: str, value: Any) -> Any:
    return copy.deepcopy(value)


def _nested(kind: type[Any]) -> Form:
    return lambda name, value: copy.deepcopy(from_nested(kind, value, name))


def _as_dict(name: str, value: Any) -> dict[str, Any]:
    given = from_nested(LoftQConfig, value or None, name)
    return asdict(given) if given else {}


def _runtime(name: str, value: Any) -> LoraRuntimeConfig:
    return from_nested(LoraRuntimeConfig, value, name) or LoraRuntimeConfig()


def _ranges(name: str, value: Any) -> list[tuple[int, int]] | None:
    return None if value is None else index_ranges(name, value)


def _one_or_more(name: str, value: Any) -> Any:
    return value if value is None or is_int(value) else indices(name, value)


def _check_one_or_more(name: str, value: Any) -> None:
    if is_int(value):
        check_int(name, value, at_least=0)
    elif value is not None:
        indices(name, value)


def _check_names(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        names(name, value)


def _check_rows(name: str, value: Any) -> None:
    tables = value if isinstance(value, dict) else {} if value is None else {None: value}
    for table, rows in tables.items():
        indices(name if table is None else f"{name}[{table!r}]", rows)


@dataclass
class LoraConfig:
    """What to adapt and how; checked where it is made, never changed by the library.

    Raises:
        ConfigError: a value is not allowed, or two values contradict each other.
    """

    task_type: TaskType | str | None = setting(form=partial(member, TaskType))
    """What the model is for, "CAUSAL_LM" for example; sequence and token classification also train the new head."""
    peft_type: PeftType | str | None = setting(form=lambda name, value: member(PeftType, name, value) or PeftType.LORA)
    """Always LORA."""
    auto_mapping: dict[str, Any] | None = setting(form=_copied, check=check_mapping)
    """Class and library of the base model, written when task_type is None."""
    peft_version: str | None = setting(check=check_text)
    """The PEFT version that wrote the file, if PEFT did."""
    base_model_name_or_path: str | None = setting(form=path_text, check=check_text)
    revision: str | None = setting(check=check_text)
    """Revision of the base model."""
    inference_mode: bool = setting(False, check=check_flag)
    """Freeze the adapter; True in every saved file."""
    r: int = setting(8, check=rank_of_adapter)
    """Rank: the inner dimension of B @ A."""
    target_modules: list[str] | set[str] | str | None = setting(form=name_set, check=check_pattern)
    """Last names (or dotted ends) of the layers to adapt, one regular expression for full names, "all-linear", or None
    for the architecture's usual layers.

    "all-linear" is every linear layer but the output head, and the experts and routers of mixtures that transformers
    keeps stacked in parameters: those go into ``target_parameters`` of the config that is saved, ``gate_up_proj``,
    which holds two layers, with twice the rank. ``lora_dropout`` cannot act on them and raises, as in PEFT, which could
    not load a file of both: set it to 0, or leave them out with exclude_modules=["experts", "gate"]."""
    exclude_modules: list[str] | set[str] | str | None = setting(form=name_set, check=check_pattern)
    """Layers to leave alone, written like target_modules; wins over it."""
    lora_alpha: int | float = setting(8, check=_ALPHA)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = setting(0.0, check=number("a probability in [0, 1)", 0, 1, closed="["))
    """Probability of zeroing an input feature of A, in [0, 1)."""
    fan_in_fan_out: bool = setting(False, check=check_flag)
    """The weight is stored as (in, out), as in GPT-2's Conv1D. For PEFT's files only: here a layer's type says it."""
    bias: str = setting("none", check=one_of(BIASES))
    """Base biases to train: "none", "all", or "lora_only" for those of adapted layers."""
    use_rslora: bool = setting(False, check=check_flag)
    """Scale by lora_alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    modules_to_save: list[str] | None = setting(form=name_list)
    """Modules to train in full and save with the adapter: ends of their names, at a dot or not, as in PEFT ("norm"
    means input_layernorm, too), or regular expressions for the whole name."""
    init_lora_weights: bool | str = True
    """Where A and B start: True (Kaiming A, B = 0), False (both random), or a name of lorafa.initializers."""
    layers_to_transform: list[int] | int | None = setting(form=_one_or_more, check=_check_one_or_more)
    """Adapt only the layers with these indices."""
    layers_pattern: list[str] | str | None = setting(form=_copied, check=_check_names)
    """Name of the list the indices count, "layers" for example."""
    rank_pattern: dict[str, int] = setting(form=name_table, check=patterns_to(rank_of_adapter), factory=dict)
    """Other ranks for some layers: a name's end or a regular expression -> rank."""
    alpha_pattern: dict[str, int | float] = setting(form=name_table, check=patterns_to(_ALPHA), factory=dict)
    """Other alphas for some layers."""
    megatron_config: dict[str, Any] | None = setting(form=_copied, check=check_mapping)
    megatron_core: str | None = setting("megatron.core", check=check_text)
    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(form=_copied, check=_check_rows)
    """Train these rows of the input embedding, or of each embedding named."""
    loftq_config: LoftQConfig | dict[str, Any] = setting(form=_as_dict, factory=dict)
    eva_config: EvaConfig | None = setting(form=_nested(EvaConfig))
    corda_config: CordaConfig | None = setting(form=_nested(CordaConfig))
    lora_ga_config: LoraGAConfig | None = setting(form=_nested(LoraGAConfig))
    use_dora: bool = setting(False, check=check_flag)
    """Learn the length of each output row apart from its direction (DoRA, arXiv:2402.09353)."""
    velora_config: VeloraConfig | None = setting(form=_nested(VeloraConfig))
    alora_invocation_tokens: list[int] | None = setting(form=_copied, check=check_tokens)
    """Activated LoRA (arXiv:2504.12397): the adapter acts from the last occurrence of these tokens on."""
    use_qalora: bool = setting(False, check=check_flag)
    qalora_group_size: int = setting(16, check=whole(at_least=1))
    monteclora_config: MontecloraConfig | None = setting(form=_nested(MontecloraConfig))
    layer_replication: list[tuple[int, int]] | None = setting(form=_ranges)
    """Ranges [start, end) of layers to stack; copies share the base weights and have adapters of their own."""
    runtime_config: LoraRuntimeConfig = setting(form=_runtime, factory=LoraRuntimeConfig)
    """How to run; never saved."""
    lora_bias: bool = setting(False, check=check_flag)
    """Give B a bias."""
    target_parameters: list[str] | None = setting(form=name_list)
    """Parameters (not modules) to adapt, such as the stacked weights of experts: dotted ends of their names."""
    use_bdlora: BdLoraConfig | None = setting(form=_nested(BdLoraConfig))
    arrow_config: ArrowConfig | None = setting(form=_nested(ArrowConfig))
    kasa_config: KasaConfig | None = setting(form=_nested(KasaConfig))
    ensure_weight_tying: bool = setting(False, check=check_flag)
    """Give all modules that share the weight of a target, of a module in ``modules_to_save`` or of a table of
    ``trainable_token_indices`` (embedding and output head) one adapter, copy or set of rows, trained as one."""
    freeze_A: bool = setting(False, check=check_flag)
    """Train B only (LoRA-FA, arXiv:2308.03303): no layer keeps its input for backward. Not in PEFT."""
    init_seed: int | None = setting(check=optional(whole(at_least=0)))
    """Seed of the random starts; None: torch.initial_seed() when the adapter is made. Not in PEFT."""
    attention_out_proj_twice: bool = setting(False, check=check_flag)
    """Apply the update of nn.MultiheadAttention's out_proj twice, as PEFT does. Not in PEFT."""
    init_config: Any = setting(check=check_settings)
    """Settings of a start for which PEFT has no field, as a dict or as the start's own class. Not in PEFT."""

    def __post_init__(self) -> None:
        take_forms(self)
        self._take_start()
        check_config(self)

    def _take_start(self) -> None:
        """Bring the start to its one form and fill in its default settings, unless it needs them given."""
        start = self.start
        if self.init_lora_weights is not True:  # which stays where settings ask for the start
            self.init_lora_weights = start.value
        field_name, kind = settings_field(start), settings_class(start)
        if field_name is not None and kind is not None and not start.initializer.needs_settings:
            given = copy.deepcopy(from_nested(kind, getattr(self, field_name), field_name))
            setattr(self, field_name, kind() if given is None else given)

    @property
    def start(self) -> Start:
        """What ``init_lora_weights`` means: a line of the table of initializers, and the number in its name.

        Raises:
            ConfigError: there is no such start.
        """
        return known_start(start_meant(self.init_lora_weights, vars(self)))

    @property
    def seed(self) -> int:
        """What random starts are drawn from: ``init_seed``, or torch.initial_seed() where that is None."""
        return torch.initial_seed() if self.init_seed is None else self.init_seed

    def start_settings(self) -> Any:
        """The settings of the start as its initializer reads them: an object of its class of settings, or None."""
        start = self.start
        field_name, kind = settings_field(start), settings_class(start)
        value = None if field_name is None else getattr(self, field_name)
        return value if field_name is None or kind is None else from_nested(kind, value, field_name)

    def check(self) -> None:
        """Check every field again, for a config whose attributes were set after it was made.

        ``dataclasses.replace(config)`` does the same and gives a copy in which every field has its one form.

        Raises:
            ConfigError: a value is not allowed, or two values contradict each other.
        """
        check_forms(self)
        check_config(self)

    def of_trained(self) -> LoraConfig:
        """A checked copy for an adapter that was made already, without the settings of other starts than it names now.

        Its start is history, and scripts set ``init_lora_weights`` to True once an adapter is trained.

        Raises:
            ConfigError: another value is not allowed.
        """
        own, kind = settings_field(self.start), settings_class(self.start)
        shared = isinstance(self.init_config, (kind or object, dict))  # a field that several starts have
        keeps = own if own != "init_config" or shared else None
        return replace(self, **{name: nothing for name, nothing in NO_SETTINGS.items() if name != keeps})

    def scaling(self, r: int, alpha: float) -> float:
        """Factor on B @ A of a layer with rank r: alpha / r, with rsLoRA alpha / sqrt(r) (arXiv:2312.03732)."""
        return scaling(r, alpha, self.use_rslora)

    @property
    def is_prompt_learning(self) -> bool:
        """False; PEFT's name, read by other libraries."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """False; PEFT's name, read by other libraries."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """PEFT's keys with values json can hold: no runtime_config, sets as sorted lists, nested configs as dicts.

        The fields PEFT does not have are there only when they are not at their default.
        """
        values = {f.name: plain(as_written(getattr(self, f.name))) for f in fields(self) if f.name != "runtime_config"}
        defaults = {f.name: f.default for f in fields(self)}
        if self.init_config is not None and self.init_config == type(self.init_config)():
            values["init_config"] = None
        return {n: v for n, v in values.items() if n not in LORAFA_ONLY or v != defaults[n]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """The config an ``adapter_config.json`` describes, whichever version of PEFT wrote it.

        A key this version does not know is passed over when it is empty (None, False, "", {} or []).

        Raises:
            ConfigError: no or another peft_type, an unknown key that carries a value, or a value that is not allowed.
        """
        if "peft_type" not in values:
            raise ConfigError("The config has no peft_type, so it describes no adapter. Expected peft_type='LORA'.")
        known = {f.name for f in fields(cls)}
        unknown = sorted(key for key, value in values.items() if key not in known and not _is_empty(value))
        if unknown:
            key = unknown[0]
            error = ConfigError(
                f"The config sets {key!s:.200}={shown(values[key])}, which lorafa {VERSION} does not know and which "
                f"may change what the adapter computes.{did_you_mean(key, known)} Use a version that knows it, or "
                "delete the key if you are sure that it changes nothing."
            )
            refuse(error, f"Passed over: {shorten([str(key)[:200] for key in unknown])}.")
        given = {key: value for key, value in values.items() if key in known and key != "runtime_config"}
        own = settings_field(known_start(start_meant(given.get("init_lora_weights", True), given)))
        for name in START_SETTINGS:
            if name != own:  # the start of a trained adapter is history: files converted to plain LoRA still carry it
                given.pop(name, None)
        return cls(**given)

    @classmethod
    def from_peft_type(cls, **values: Any) -> LoraConfig:
        """PEFT's name of :meth:`from_dict`, with the keys as arguments."""
        return cls.from_dict(values)

    @classmethod
    def check_kwargs(cls, **values: Any) -> dict[str, Any]:
        """The arguments as they are: PEFT's hook for settings that configs of some methods bring into one form."""
        return values

    def _register_custom_module(self, custom_mapping: Mapping[type, type]) -> NoReturn:
        """Raises NotAvailableError: what PEFT does by a class of layers, a back end does here."""
        raise NotAvailableError(
            f"LoraConfig._register_custom_module({shorten(kind.__name__ for kind in custom_mapping)}): lorafa has no "
            "classes of layers to register. A back end says how a type of layer stores its weight, and all starts and "
            "formulas go on it then: lorafa.backends.BACKENDS.add, see CONTRIBUTING.md."
        )

    @classmethod
    def from_json_file(cls, path_json_file: str | Path) -> dict[str, Any]:
        """The keys and values of a json file as they stand there; :meth:`from_dict` makes a config of them."""
        return read_json(path_json_file)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **hub: Unpack[HubOptions]
    ) -> LoraConfig:
        """The config saved in a folder or a Hub repository.

        Raises:
            SourceError: there is no such folder, repository or file, or the Hub cannot be reached.
            CheckpointError: the file is no json.
            ConfigError: the file's content is not allowed, see :meth:`from_dict`; or an argument that does not exist.
        """
        check_arguments("LoraConfig.from_pretrained", hub, HubOptions.__optional_keys__)
        known: Any = {name: value for name, value in hub.items() if name in HubOptions.__optional_keys__}
        return read_config(locate(pretrained_model_name_or_path, [CONFIG_NAME], subfolder=subfolder, **known))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``adapter_config.json`` into a folder, whole or not at all.

        Raises:
            CheckpointError: the folder cannot be written to.
        """
        write_json(make_folder(save_directory) / CONFIG_NAME, self.to_dict())

    def push_to_hub(self, repo_id: str, **options: Unpack[UploadOptions]) -> Any:
        """Upload ``adapter_config.json`` to a repository of the Hub; as :meth:`lorafa.PeftModel.push_to_hub`."""
        with uploaded(repo_id, "config", options) as upload:
            self.save_pretrained(upload.folder)
        return upload.commit


PeftConfig = LoraConfig
"""PEFT's name for what all configs are; here there is one."""


def read_config(path: Path, changed: Mapping[str, Any] | None = None) -> LoraConfig:
    """The config in a file, with ``changed`` fields; errors are those of :meth:`LoraConfig.from_dict` with its name."""
    try:
        return LoraConfig.from_dict(read_json(path) | dict(changed or {}))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _is_empty(value: object) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def check_config(config: LoraConfig) -> None:
    """Raises ConfigError for the first value that is not allowed."""
    check_fields(config)
    _check_layers(config)
    _check_start(config)
    if config.use_dora and config.megatron_config:
        raise ConfigError("use_dora does not work on Megatron's layers. Drop megatron_config or set use_dora=False.")
    for variant in variant_types(config):
        if config.lora_bias and not variant.takes_bias:
            asked = variant.switch or "init_lora_weights"
            raise ConfigError(
                f"lora_bias=True does not work with {asked}={getattr(config, asked)!r}. Drop one of the two."
            )
        if variant.learns_from_A and config.freeze_A:
            raise ConfigError(
                f"freeze_A=True freezes A, and {variant.switch} works by the gradient of A. Drop one of the two."
            )


def _check_layers(config: LoraConfig) -> None:
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and getattr(config, name) not in (None, []):
            raise ConfigError(
                f"{name} needs a list of target_modules, found the text {config.target_modules!r}. Pass a list such "
                f"as ['q_proj', 'v_proj'], or put the layer numbers into the regular expression and drop {name}."
            )
    if config.layers_pattern and config.layers_to_transform is None:
        raise ConfigError(
            f"layers_pattern={config.layers_pattern!r} says which list to count in, but layers_to_transform, which "
            "says what to pick, is None. Set layers_to_transform or drop layers_pattern."
        )


def _check_start(config: LoraConfig) -> None:
    start = config.start
    _check_settings(config, start)
    if config.freeze_A and start.initializer.trains == "A":
        raise ConfigError(
            f"freeze_A=True leaves nothing to train: init_lora_weights={start.value!r} trains A alone. Drop one of the "
            "two."
        )
    check_rank = start.initializer.check_rank
    ranks = {"r": config.r} | {f"rank_pattern[{key!r}]": rank for key, rank in config.rank_pattern.items()}
    for name, rank in ranks.items():
        if check_rank is not None:
            check_rank(rank, f"{name}={rank}")


def _check_settings(config: LoraConfig, start: Start) -> None:
    own = settings_field(start)
    for name in START_SETTINGS:
        if getattr(config, name) and name != own:
            owner = name.removesuffix("_config")
            instead = f"Set init_lora_weights={owner!r} or drop" if owner != "init" else "Drop"
            raise ConfigError(
                f"{name} is set but would be ignored: init_lora_weights is {start.value!r}. {instead} {name}."
            )
    kind = settings_class(start)
    if start.initializer.needs_settings and own and kind and not getattr(config, own):
        raise ConfigError(f"init_lora_weights={start.value!r} needs {own}. Pass {own}={kind.__name__}().")
    if own == "init_config" and kind is not None:
        from_nested(kind, config.init_config, own)
