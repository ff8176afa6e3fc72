"""LoraConfig: what to adapt and how. Fields, order and defaults are those of PEFT 0.21.2, and so is the json."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafa.adapter import scaling
from lorafa.checks import index_ranges, indices, is_int, member, name_table, names, plain
from lorafa.config_checks import (
    SETTINGS_OF_PEFT,
    START_SETTINGS,
    check_config,
    settings_class,
    settings_field,
    start_meant,
)
from lorafa.errors import ConfigError, NotAvailableError, did_you_mean
from lorafa.initializers import Start, known_start
from lorafa.method_configs import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
    from_nested,
)
from lorafa.storage import HubOptions, UploadOptions, locate, make_folder, read_json, uploaded, write_json
from lorafa.variants import switches
from lorafa.version import VERSION

if TYPE_CHECKING:
    from typing_extensions import Unpack

CONFIG_NAME = "adapter_config.json"
_NESTED: dict[str, type[Any]] = {
    **{name: kind for name, kind in SETTINGS_OF_PEFT.items() if kind is not LoftQConfig},  # which is kept as a dict
    "velora_config": VeloraConfig,
    "monteclora_config": MontecloraConfig,
    "arrow_config": ArrowConfig,
    "use_bdlora": BdLoraConfig,
}
_LORAFA_ONLY = ("freeze_A", "init_seed", "attention_out_proj_twice", "init_config")

# What this version does not have yet: the fields that ask for it, and its name. A line is deleted when its field is
# read; a variant's when the variant declares the field as its switch.
_LATER_FIELDS = {
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "Activated LoRA (aLoRA)",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing",
    "megatron_config": "LoRA on Megatron's parallel layers",
    "layer_replication": "Layer replication",
}
# The same for starts: the variant they ask for, and its name. A line is deleted when the variant is registered.
_LATER_FORMULAS = {"goat": "The routed forward pass of GOAT's experts"}


class TaskType(str, Enum):
    """What the adapted model is for; as in PEFT."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, Enum):
    """The kind of adapter; lorafa has one."""

    LORA = "LORA"


@dataclass
class LoraConfig:
    """What to adapt and how; checked where it is made, never changed by the library.

    Raises:
        ConfigError: a value is not allowed, or two values contradict each other.
    """

    task_type: TaskType | str | None = None
    """What the model is for, "CAUSAL_LM" for example; sequence and token classification also train the new head."""
    peft_type: PeftType | str | None = None
    """Always LORA."""
    auto_mapping: dict[str, Any] | None = None
    """Class and library of the base model, written when task_type is None."""
    peft_version: str | None = None
    """The PEFT version that wrote the file, if PEFT did."""
    base_model_name_or_path: str | None = None
    revision: str | None = None
    """Revision of the base model."""
    inference_mode: bool = False
    """Freeze the adapter; True in every saved file."""
    r: int = 8
    """Rank: the inner dimension of B @ A."""
    target_modules: list[str] | set[str] | str | None = None
    """Last names (or dotted ends) of the layers to adapt, one regular expression for full names, "all-linear", or None
    for the architecture's usual layers.

    "all-linear" is every linear layer but the output head, and the experts and routers of mixtures that transformers
    keeps stacked in parameters: those go into ``target_parameters`` of the config that is saved, ``gate_up_proj``,
    which holds two layers, with twice the rank. ``lora_dropout`` cannot act on them and raises, as in PEFT, which could
    not load a file of both: set it to 0, or leave them out with exclude_modules=["experts", "gate"]."""
    exclude_modules: list[str] | set[str] | str | None = None
    """Layers to leave alone, written like target_modules; wins over it."""
    lora_alpha: int | float = 8
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Probability of zeroing an input feature of A, in [0, 1)."""
    fan_in_fan_out: bool = False
    """The weight is stored as (in, out), as in GPT-2's Conv1D. For PEFT's files only: here a layer's type says it."""
    bias: str = "none"
    """Base biases to train: "none", "all", or "lora_only" for those of adapted layers."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    modules_to_save: list[str] | None = None
    """Modules to train in full and save with the adapter: ends of their names, at a dot or not, as in PEFT ("norm"
    means input_layernorm, too), or regular expressions for the whole name."""
    init_lora_weights: bool | str = True
    """Where A and B start: True (Kaiming A, B = 0), False (both random), or a name of lorafa.initializers."""
    layers_to_transform: list[int] | int | None = None
    """Adapt only the layers with these indices."""
    layers_pattern: list[str] | str | None = None
    """Name of the list the indices count, "layers" for example."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some layers: a name's end or a regular expression -> rank."""
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    """Other alphas for some layers."""
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Train these rows of the input embedding, or of each embedding named."""
    loftq_config: LoftQConfig | dict[str, Any] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    """Learn the length of each output row apart from its direction (DoRA, arXiv:2402.09353)."""
    velora_config: VeloraConfig | None = None
    alora_invocation_tokens: list[int] | None = None
    """Activated LoRA (arXiv:2504.12397): the adapter acts from the last occurrence of these tokens on."""
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: MontecloraConfig | None = None
    layer_replication: list[tuple[int, int]] | None = None
    """Ranges [start, end) of layers to stack; copies share the base weights and have adapters of their own."""
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    """How to run; never saved."""
    lora_bias: bool = False
    """Give B a bias."""
    target_parameters: list[str] | None = None
    """Parameters (not modules) to adapt, such as the stacked weights of experts: dotted ends of their names."""
    use_bdlora: BdLoraConfig | None = None
    arrow_config: ArrowConfig | None = None
    kasa_config: KasaConfig | None = None
    ensure_weight_tying: bool = False
    """Give all modules that share the weight of a target, of a module in ``modules_to_save`` or of a table of
    ``trainable_token_indices`` (embedding and output head) one adapter, copy or set of rows, trained as one."""
    freeze_A: bool = False
    """Train B only (LoRA-FA, arXiv:2308.03303): no layer keeps its input for backward. Not in PEFT."""
    init_seed: int | None = None
    """Seed of the random starts; None: torch.initial_seed() when the adapter is made. Not in PEFT."""
    attention_out_proj_twice: bool = False
    """Apply the update of nn.MultiheadAttention's out_proj twice, as PEFT does. Not in PEFT."""
    init_config: Any = None
    """Settings of a start for which PEFT has no field, as a dict or as the start's own class. Not in PEFT."""

    def __post_init__(self) -> None:
        self._take_copies()
        self.check()

    def _take_copies(self) -> None:
        """Bring every field to its one form without touching the objects handed in."""
        self.task_type = member(TaskType, "task_type", self.task_type)
        self.peft_type = member(PeftType, "peft_type", self.peft_type) or PeftType.LORA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, set(names(name, value)))
        for name in ("modules_to_save", "target_parameters"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else names(name, value))
        for name in ("rank_pattern", "alpha_pattern"):
            setattr(self, name, name_table(name, getattr(self, name)))
        if self.layers_to_transform is not None and not is_int(self.layers_to_transform):
            self.layers_to_transform = indices("layers_to_transform", self.layers_to_transform)
        for name in ("auto_mapping", "megatron_config", "layers_pattern", "alora_invocation_tokens"):
            setattr(self, name, copy.copy(getattr(self, name)))
        self.trainable_token_indices = copy.deepcopy(self.trainable_token_indices)
        for name, config_class in _NESTED.items():
            setattr(self, name, copy.deepcopy(from_nested(config_class, getattr(self, name), name)))
        runtime = from_nested(LoraRuntimeConfig, self.runtime_config, "runtime_config")
        self.runtime_config = runtime or LoraRuntimeConfig()
        loftq = from_nested(LoftQConfig, self.loftq_config or None, "loftq_config")
        self.loftq_config = asdict(loftq) if loftq else {}
        self._take_start()
        if self.layer_replication is not None:
            self.layer_replication = index_ranges("layer_replication", self.layer_replication)

    def _take_start(self) -> None:
        """Bring the start to its one form and fill in its default settings, which all but LoftQ have."""
        start = self.start
        if self.init_lora_weights is not True:  # which stays where settings ask for the start
            self.init_lora_weights = start.value
        field_name, kind = settings_field(start), settings_class(start)
        if field_name is not None and kind is not None and kind is not LoftQConfig:
            given = copy.deepcopy(from_nested(kind, getattr(self, field_name), field_name))
            setattr(self, field_name, kind() if given is None else given)

    @property
    def start(self) -> Start:
        """What ``init_lora_weights`` means: a line of the table of initializers, and the number in its name.

        Raises:
            ConfigError: there is no such start.
        """
        value = start_meant(self.init_lora_weights, vars(self))
        known: tuple[Any, Start] | None = self.__dict__.get("_start")
        if known is None or known[0] != value:  # parsed once, and again where it was set since
            known = self.__dict__["_start"] = value, known_start(value)
        return known[1]

    @property
    def seed(self) -> int:
        """What random starts are drawn from: ``init_seed``, or torch.initial_seed() where that is None."""
        return torch.initial_seed() if self.init_seed is None else self.init_seed

    def start_settings(self) -> Any:
        """The settings of the start as its initializer reads them: an object of its class of settings, or None."""
        field_name, kind = settings_field(self.start), settings_class(self.start)
        value = None if field_name is None else getattr(self, field_name)
        return value if field_name is None or kind is None else from_nested(kind, value, field_name)

    def check(self) -> None:
        """Check every field again, for a config whose attributes were set after it was made.

        ``dataclasses.replace(config)`` does the same and gives a copy in which every field has its one form.

        Raises:
            ConfigError: a value is not allowed, or two values contradict each other.
        """
        check_config(self)

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
        values = {name: plain(value) for name, value in asdict(self).items() if name != "runtime_config"}
        defaults = {f.name: f.default for f in fields(self)}
        if self.init_config is not None and self.init_config == type(self.init_config)():
            values["init_config"] = None
        return {n: v for n, v in values.items() if n not in _LORAFA_ONLY or v != defaults[n]}

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
            raise ConfigError(
                f"The config sets {key}={values[key]!r}, which lorafa {VERSION} does not know and which may change "
                f"what the adapter computes.{did_you_mean(key, known)} Use a version that knows it, or delete the key "
                "if you are sure that it changes nothing."
            )
        given = {key: value for key, value in values.items() if key in known and key != "runtime_config"}
        own = settings_field(known_start(start_meant(given.get("init_lora_weights", True), given)))
        for name in START_SETTINGS:
            if name != own:  # the start of a trained adapter is history: files converted to plain LoRA still carry it
                given.pop(name, None)
        return cls(**given)

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
            ConfigError: the file's content is not allowed; see :meth:`from_dict`.
        """
        return read_config(locate(pretrained_model_name_or_path, [CONFIG_NAME], subfolder=subfolder, **hub))

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


def read_config(path: Path) -> LoraConfig:
    """The config in a file; errors name the file, otherwise they are those of :meth:`LoraConfig.from_dict`."""
    try:
        return LoraConfig.from_dict(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _is_empty(value: object) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def unavailable(config: LoraConfig) -> list[str]:
    """The documented features the config asks for and this version does not have, as "QA-LoRA (use_qalora=True)"."""
    built = switches()
    asked = [
        f"{feature} ({name}={getattr(config, name)!r})"
        for name, feature in _LATER_FIELDS.items()
        if getattr(config, name) and name not in built
    ]
    if formula := _LATER_FORMULAS.get(config.start.initializer.variant or ""):
        asked.append(f"{formula} (init_lora_weights={config.init_lora_weights!r})")
    if config.runtime_config.ephemeral_gpu_offload:
        asked.append("Computing DoRA's start on the GPU (runtime_config.ephemeral_gpu_offload=True)")
    return asked


def require_available(config: LoraConfig) -> None:
    """Refuse a config this version cannot carry out in full.

    Raises:
        NotAvailableError: names every such feature and the field that asks for it.
    """
    asked = unavailable(config)
    if asked:
        raise NotAvailableError(
            f"{' and '.join(asked)} {'is' if len(asked) == 1 else 'are'} not available yet in lorafa {VERSION}; "
            "nothing was changed. Leave the field at its default to go on without it."
        )
