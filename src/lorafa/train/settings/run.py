"""Every setting of a run: its name, its type, its neutral value and, in the text under it, its meaning.

The text under a field is what ``lorafa train --help`` prints. The numbers a run starts from stand in
``lorafa/conf/*/*.yaml``; the values here are used for what those files leave out. All classes are frozen and check
their ranges when they are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from lorafa.errors import ConfigError
from lorafa.evals import EVALS
from lorafa.registry import Registry
from lorafa.settings.checks import check_choice, check_int, check_number
from lorafa.settings.groups import OpenGroup
from lorafa.settings.methods import (
    ArrowConfig,
    BdLoraConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from lorafa.train.settings.align import EXTERNAL, NONE, AlignConfig
from lorafa.train.settings.data import DataConfig
from lorafa.train.settings.init import InitConfig
from lorafa.train.settings.model import ModelConfig
from lorafa.train.settings.objective import ObjectiveConfig
from lorafa.train.settings.optim import OptimConfig, check_rise, entry_of
from lorafa.train.settings.schedules import SCHEDULES
from lorafa.train.trackers import TRACKERS, names_in

SEEDS = 2**32
"""How many seeds NumPy's generator knows; transformers seeds it with PyTorch's."""
MOST_THREADS = 1024
"""More is a slip of the pen, and starting them brings the process down."""


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The adapter; ranges are checked by `lorafa.LoraConfig`, whose names these are."""

    in_its_place: ClassVar[tuple[str, ...]] = ("adapter", "full")
    """Settings that say what is trained in the place of a new adapter."""
    adapter: str | None = None
    """Folder of an adapter to train on; all other settings of peft are then those of its file."""
    full: bool = False
    """Train every weight of the model, in float32, and no adapter: what adapters are compared with. The weights are
    kept, and measured, in model.dtype. All other settings of peft, and init, stay as they are then."""
    r: int = 8
    """Rank: inner dimension of B @ A. auto takes what `lorafa plan` recommends, and the number is recorded."""
    lora_alpha: int | float = 8
    """The update is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora. auto as in r."""
    lora_dropout: float | None = None
    """Probability of zeroing an input feature of A, in [0, 1); null is 0.05, or 0 where the start takes a part of the
    base into A and B, of which dropout would take away as well, and where stacked experts are adapted, on which it
    cannot act."""
    target_modules: str | list[str] | None = "all-linear"
    """Modules to adapt: all-linear, a list of names, or one regular expression; null takes those usual for the
    architecture."""
    exclude_modules: str | list[str] | None = None
    """Modules left alone although target_modules matches them."""
    layers_to_transform: int | list[int] | None = None
    """Only these layer numbers; needs a list as target_modules."""
    layers_pattern: str | list[str] | None = None
    """Name of the list of layers that layers_to_transform counts."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Module name or expression -> rank, where it differs from r."""
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    """Module name or expression -> lora_alpha, where it differs."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (rsLoRA)."""
    use_dora: bool = False
    """Train a magnitude for each output row as well (DoRA)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model are trained."""
    lora_bias: bool = False
    """Give B a bias of its own."""
    freeze_A: bool = False
    """Train B only."""
    modules_to_save: list[str] | None = None
    """Modules trained in full and saved with the adapter."""
    target_parameters: list[str] | None = None
    """Parameters that belong to no layer of their own, such as stacked experts, to adapt by name."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Rows of the input embedding to train, or of each embedding named."""
    ensure_weight_tying: bool = False
    """Give modules that share a weight one adapter, copy or set of rows, trained as one."""
    layer_replication: list[tuple[int, int]] | None = None
    """Ranges [start, end) of layers to stack; copies share the base weights and have adapters of their own."""
    fan_in_fan_out: bool = False
    """The weight is stored as (in, out); for PEFT's files only, a layer's type says it here."""
    attention_out_proj_twice: bool = False
    """Apply the update of nn.MultiheadAttention's out_proj twice, as PEFT does."""
    alora_invocation_tokens: list[int] | None = None
    """Activated LoRA: the adapter acts from the last occurrence of these tokens on."""
    use_qalora: bool = False
    """QA-LoRA: group the inputs of A as the quantized base groups its own."""
    qalora_group_size: int = 16
    """QA-LoRA: inputs in a group."""
    velora_config: VeloraConfig | None = None
    """VeLoRA; {} takes its defaults."""
    monteclora_config: MontecloraConfig | None = None
    """MonteCLoRA; {} takes its defaults."""
    use_bdlora: BdLoraConfig | None = None
    """BD-LoRA; {} takes its defaults."""
    arrow_config: ArrowConfig | None = None
    """Arrow routing; {} takes its defaults."""
    megatron_config: dict[str, Any] | None = None
    """Settings of Megatron's parallel layers."""
    megatron_core: str | None = "megatron.core"
    """Module of Megatron's parallel layers."""
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    """How to run; never saved."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of the training, its batches, and what is kept."""

    steps: int | None = None
    """Optimizer steps. This or epochs is enough: the other is null then."""
    epochs: float | None = None
    """Passes over the training records, whole or in part."""
    batch_size: int = 8
    """Samples in one forward pass of one process; several train on as many together."""
    accumulation: int = 1
    """Forward passes in one optimizer step."""
    group_by_length: bool = True
    """Put samples of like length into one batch, to pad less."""
    packing: bool = False
    """Put several samples into one row of up to data.max_length tokens, so that little is padding. batch_size counts
    such rows then. Samples do not see each other, and the loss is that of the same samples in rows of their own."""
    chunked_loss: bool = True
    """Send only the supervised positions through the output head, in chunks; same loss, less memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    seed: int = 0
    """Seed of the adapter's start, the dropout and the order of the samples."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0 writes none."""
    checkpoint_epochs: float | None = None
    """Passes over the training records between two checkpoints, in place of checkpoint_every."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted."""
    eval_every: int = 0
    """Steps between two measurements of the held-out loss during training; 0 measures before and after only."""
    eval_epochs: float | None = None
    """Passes over the training records between two measurements, in place of eval_every."""
    eval_size: int | None = None
    """Held-out samples of such a measurement; null takes all."""
    patience: int | None = None
    """Stop after so many measurements of the held-out loss without a lower one; needs eval_every or keep_best."""
    rules: Literal[1, 2] = 2
    """How a warm-up counts and rows are ordered. 2: the first step has a rate, and two seeds have nothing in common.
    1: as runs had it that were begun before; they keep it, and a run of today can be compared with them."""
    keep_best: bool = False
    """Measure the held-out loss at every checkpoint and end with the best one."""
    save_merged: bool = False
    """Save the whole model with the adapter merged into it beside the adapter, with its tokenizer, in merged/."""
    resume: str | None = None
    """Run directory to continue from its last checkpoint; its settings are taken from there."""

    @property
    def measures(self) -> bool:
        """Whether the held-out loss is measured on the way."""
        return bool(self.eval_every or self.eval_epochs or self.keep_best)

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"train.steps={self.steps} and train.epochs={self.epochs:g} both say how long the training is. Give "
                "one of the two."
            )
        if self.steps is None and self.epochs is None:
            raise ConfigError("Nothing says how long the training is. Give train.steps, or train.epochs=1 for example.")
        if self.steps is not None:
            check_int("train.steps", self.steps, at_least=1)
        if self.epochs is not None:
            check_number("train.epochs", self.epochs, "a number > 0", 0)
        for name in ("batch_size", "accumulation", "log_every", "keep_checkpoints"):
            check_int(f"train.{name}", getattr(self, name), at_least=1)
        for name in ("seed", "checkpoint_every", "eval_every"):
            check_int(f"train.{name}", getattr(self, name), at_least=0)
        _check_at_most("train.seed", self.seed, SEEDS - 1)
        for what in ("checkpoint", "eval"):
            every, epochs = getattr(self, f"{what}_every"), getattr(self, f"{what}_epochs")
            if epochs is not None:
                check_number(f"train.{what}_epochs", epochs, "a number > 0", 0)
                if every:
                    raise ConfigError(
                        f"train.{what}_every={every} and train.{what}_epochs={epochs:g} say the same thing twice. Drop "
                        "one of the two."
                    )
        if self.eval_size is not None:
            check_int("train.eval_size", self.eval_size, at_least=1)
        if self.patience is not None:
            check_int("train.patience", self.patience, at_least=1)
            if not self.measures:
                raise ConfigError(
                    f"train.patience={self.patience} counts measurements of the held-out loss, and none is made on the "
                    "way. Set train.eval_every, for example to 10."
                )
        if self.keep_best and (
            self.eval_every not in (0, self.checkpoint_every) or self.eval_epochs not in (None, self.checkpoint_epochs)
        ):
            raise ConfigError(
                f"train.keep_best measures at every checkpoint (train.checkpoint_every={self.checkpoint_every}), found "
                f"train.eval_every={self.eval_every}, train.eval_epochs={self.eval_epochs}. Leave them out."
            )
        if self.keep_best and not (self.checkpoint_every or self.checkpoint_epochs):
            raise ConfigError(
                "train.keep_best chooses among checkpoints, but train.checkpoint_every is 0. "
                "Set train.checkpoint_every, for example to 50."
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig(OpenGroup):
    """How the model is measured before and after."""

    group: ClassVar[str] = "eval"
    opens: ClassVar[Mapping[str, str]] = {"name": "own"}
    lines: ClassVar[Mapping[str, Registry[Any]]] = {"name": EVALS}

    name: str = "gsm8k"
    """What is measured beside the answer loss."""
    before: bool = True
    """Measure before training too."""
    batch_size: int = 32
    """Prompts answered at a time."""
    forgetting: bool = False
    """Measure after the training how far the model has moved from its base too: the KL in nats a token, on texts that
    the base writes."""
    own: Any = None
    """The evaluation's own settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("eval.batch_size", self.batch_size, at_least=1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the outcome of a run, and where it is written."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    init: InitConfig = field(default_factory=InitConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=100))
    eval: EvalConfig = field(default_factory=EvalConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    run_dir: str | None = None
    """Directory to create for the run; null makes runs/<date>-<time>-<adapter>."""
    if_exists: Literal["error", "resume", "new"] = "error"
    """What to do where run_dir holds a run already: refuse; resume it from its last checkpoint, where the settings are
    the same; or take the next free name, <run_dir>-2 and so on."""
    threads: int | None = None
    """Processor threads; null takes PyTorch's choice."""
    report_to: str | list[str] = "none"
    """Where the training is reported beside its own record: none, or one or several of tensorboard (into the run
    directory), wandb, trackio, mlflow. Each goes by its own environment variables, WANDB_MODE=offline for example."""
    report_project: str = "lorafa"
    """The project, or experiment, it is filed under there; the run is called like its directory."""

    def __post_init__(self) -> None:
        trackers = names_in(self.report_to)
        for name in trackers:
            check_choice("report_to", name, ["none", *TRACKERS.names()])
        if "none" in trackers or len({*trackers}) < len(trackers):
            raise ConfigError(f"report_to={','.join(trackers)} contradicts itself. Name each once, or none alone.")
        if self.threads is not None:
            check_int("threads", self.threads, at_least=1)
            _check_at_most("threads", self.threads, MOST_THREADS)
        if self.peft.full and self.model.quantize is not None:
            raise ConfigError(
                f"peft.full=true trains every weight, and codes (model.quantize={self.model.quantize}) cannot be "
                "trained. Drop one of the two."
            )
        if self.peft.adapter is not None and (self.init.mode != InitConfig().mode or self.init.ranks is not None):
            chosen = f"init.mode={self.init.mode}" if self.init.ranks is None else f"init.ranks={self.init.ranks}"
            raise ConfigError(
                f"{chosen} would change nothing: peft.adapter={self.peft.adapter} starts where its file stands. Drop "
                "one of the two."
            )
        if self.peft.full:
            self._check_full()
        if self.align.trust_remote_code and self.align.name == NONE and not self.train.resume:
            raise ConfigError("align.trust_remote_code=true would change nothing: there is no teacher. Drop it.")
        self.objective.check_beside(self.model, self.align, self.peft, self.train)
        if self.align.teaches and not self.train.chunked_loss:
            raise ConfigError(f"align={self.align.name} needs train.chunked_loss=true. Drop one of the two.")
        if self.eval.forgetting and self.peft.bias != "none":
            raise ConfigError(
                f"eval.forgetting=true compares with the model whose adapters are off, and peft.bias={self.peft.bias} "
                "trains biases of the base itself, which would be in both. Drop one of the two."
            )
        if SCHEDULES.get(self.optim.schedule).measured and not self.train.measures:
            raise ConfigError(
                f"optim.schedule={self.optim.schedule} goes by the held-out loss, which is not measured on the way. "
                "Set train.eval_every, for example to 10."
            )
        if self.train.steps is not None:
            check_rise(self.optim, self.train.steps, f"train.steps={self.train.steps}")

    def _check_full(self) -> None:
        """Raises ConfigError for what needs an adapter."""
        without = PeftConfig(full=True)
        changed = [f"peft.{one.name}" for one in fields(PeftConfig) if _differs(self.peft, without, one.name)]
        changed += [f"init.{one.name}" for one in fields(InitConfig) if _differs(self.init, InitConfig(), one.name)]
        if changed:
            raise ConfigError(
                f"{changed[0]} is a setting of an adapter, and peft.full=true trains the model itself, without one. "
                "Drop one of the two."
            )
        if self.align.teaches and self.align.name != EXTERNAL:
            raise ConfigError(
                f"align={self.align.name} is a state of the student's adapters, and with peft.full=true there are "
                "none. Take align=external."
            )
        if self.train.save_merged:
            raise ConfigError(
                "train.save_merged=true saves the model an adapter was merged into, and with peft.full=true the model "
                "is saved anyway. Drop one of the two."
            )
        if self.eval.forgetting:
            raise ConfigError(
                "eval.forgetting=true compares with the model whose adapters are off, and with peft.full=true there "
                "are none. Leave it out, and measure afterwards: lorafa eval <run> task=forgetting eval.base=<model>."
            )
        if entry_of(self.optim).make is not None:
            raise ConfigError(
                f"optim={self.optim.name} works on the factors A and B of adapters, and with peft.full=true there are "
                "none. Choose another, optim=adamw for example."
            )


def _differs(one: Any, other: Any, name: str) -> bool:
    return bool(getattr(one, name) != getattr(other, name))


def _check_at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise ConfigError(f"{name} must be an integer <= {most}, found {value}. Give a smaller one.")
