"""Every setting of a run: its name, its type, its neutral value and, in the text under it, its meaning.

The text under a field is what ``lorafa train --help`` prints. The numbers a run starts from stand in
``lorafa/conf/*/*.yaml``; the values here are used for what those files leave out. All classes are frozen and check
their ranges when they are made.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from lorafa.checks import check_betas, check_choice, check_int, check_number
from lorafa.errors import ConfigError
from lorafa.train.init_config import InitConfig
from lorafa.train.optimizers import NAMES, OPTIONS, kind_of, owners, words

SEEDS = 2**32
"""How many seeds NumPy's generator knows; transformers seeds it with PyTorch's."""
MOST_THREADS = 1024
"""More is a slip of the pen, and starting them brings the process down."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model."""

    name: str = "smollm2-135m"
    """Base model: smollm2-135m, a local folder, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model; null takes the newest."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights; auto keeps the stored one. Adapters are float32 all the same."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """How attention is computed; auto leaves it to transformers. On a CPU eager is faster for short samples."""
    cache_dir: str | None = None
    """Folder for fetched models; null takes the user's cache."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The records to learn from and the ones held out."""

    name: str = "word_problems"
    """Task: word_problems, a .jsonl or .json file, or a Hub data set id."""
    train_size: int | None = None
    """Records to train on; null takes all that are left after the held-out ones."""
    eval_size: int = 100
    """Records held out for evaluation, never trained on."""
    max_length: int = 1024
    """Longest sample in tokens; what happens to a longer one is counted and printed."""
    seed: int = 0
    """Seed of the generated or shuffled records: decides which are held out."""
    prompt_column: str | None = None
    """Column of the prompts; null takes the first known one."""
    completion_column: str | None = None
    """Column of the answers; given together with prompt_column."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    split: str = "train"
    """Split of a Hub data set."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    templates: int | None = None
    """Kinds of word_problems to use, those with the shortest text; null uses all."""
    cache_dir: str | None = None
    """Folder for what word_problems are made from; null takes the user's cache."""

    def __post_init__(self) -> None:
        if self.train_size is not None:
            check_int("data.train_size", self.train_size, at_least=1)
        if self.templates is not None:
            check_int("data.templates", self.templates, at_least=1)
        check_int("data.eval_size", self.eval_size, at_least=1)
        check_int("data.max_length", self.max_length, at_least=2)
        check_int("data.seed", self.seed, at_least=0)


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The adapter; ranges are checked by `lorafa.LoraConfig`, whose names these are."""

    r: int = 8
    """Rank: inner dimension of B @ A."""
    lora_alpha: int = 8
    """The update is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
    lora_dropout: float | None = None
    """Probability of zeroing an input feature of A, in [0, 1); null is 0.05, or 0 where the start takes a part of the
    base into A and B, of which dropout would take away as well, and where stacked experts are adapted, on which it
    cannot act."""
    target_modules: str | list[str] = "all-linear"
    """Modules to adapt: all-linear, a list of names, or one regular expression."""
    exclude_modules: str | list[str] | None = None
    """Modules left alone although target_modules matches them."""
    layers_to_transform: int | list[int] | None = None
    """Only these layer numbers; needs a list as target_modules."""
    layers_pattern: str | list[str] | None = None
    """Name of the list of layers that layers_to_transform counts."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Module name or expression -> rank, where it differs from r."""
    alpha_pattern: dict[str, int] = field(default_factory=dict)
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


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "adafactor", "sgd", "lora_fa", "lora_plus", "riemannian", "preconditioned", "lora_pro"] = (
        "adamw"
    )
    """Optimizer."""
    lr: float = 2e-4
    """Highest learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the trained parameters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments; all but adafactor, sgd and lora_pro's form sgd."""
    eps: float | None = None
    """Added to the denominator, same optimizers; null takes 1e-6 for lora_fa, 1e-8 for the others."""
    warmup: float = 0.0
    """Rise of the learning rate: steps if >= 1, a share of all steps below 1."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Course of the learning rate after the warm-up."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are shortened to it; 0 leaves them alone."""
    algorithm: Literal["exact", "fold"] = "exact"
    """lora_fa: project B's gradient (exact), or make the rows of A orthonormal once (fold)."""
    lr_ratio: float = 16.0
    """lora_plus: learning rate of B over that of A."""
    reg: float = 1e-2
    """riemannian: what is added to the diagonals of the two Gram matrices."""
    damping: Literal["relative", "absolute"] = "relative"
    """riemannian: reg in units of the mean eigenvalue, or as it is."""
    prec_reg: float = 1e-6
    """preconditioned: what LoRA-One adds to the diagonals."""
    form: Literal["adamw", "sgd", "full"] = "adamw"
    """lora_pro: moments of A and B, none, or of the whole weight (8 bytes a weight)."""
    X: Literal["zero", "sylvester", "symmetric"] = "sylvester"
    """lora_pro: how A and B share what both can reach."""
    gram_damping: float = 1e-8
    """lora_pro: added to the two Gram matrices, in units of their mean eigenvalue."""
    momentum: float = 0.0
    """lora_pro, form sgd: share of the step before that is added to the next, in [0, 1)."""

    def __post_init__(self) -> None:
        check_choice("optim.name", self.name, NAMES)
        self._require_that_options_are_read()
        check_number("optim.lr", self.lr, "a number > 0", 0)
        check_number("optim.weight_decay", self.weight_decay, "a number >= 0", 0, closed="[")
        check_betas("optim.betas", self.betas)
        check_number("optim.eps", self.eps, "a number > 0", 0)
        check_number("optim.warmup", self.warmup, "a number >= 0", 0, closed="[")
        check_number("optim.max_grad_norm", self.max_grad_norm, "a number >= 0", 0, closed="[")
        check_number("optim.lr_ratio", self.lr_ratio, "a number > 0", 0)
        check_number("optim.reg", self.reg, "a number >= 0", 0, closed="[")
        check_number("optim.prec_reg", self.prec_reg, "a number > 0", 0)
        check_number("optim.gram_damping", self.gram_damping, "a number >= 0", 0, closed="[")
        check_number("optim.momentum", self.momentum, "a number in [0, 1)", 0, 1, closed="[")

    def _require_that_options_are_read(self) -> None:
        kind = kind_of(self)
        if self.eps is None:
            object.__setattr__(self, "eps", kind.eps)  # so that a record of the run says which it was
        defaults = {field.name: field.default for field in fields(self)} | {"eps": kind.eps}
        for option in OPTIONS:
            if option not in kind.reads and getattr(self, option) != defaults[option]:
                having = owners(option)
                raise ConfigError(
                    f"optim.{option} belongs to optim={', '.join(having)}, found optim={words(self)}. Choose "
                    f"optim={having[0]}, or leave optim.{option} out."
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The length of the training, its batches, and what is kept."""

    steps: int | None = None
    """Optimizer steps; null goes by epochs."""
    epochs: float | None = None
    """Passes over the training records; null goes by steps."""
    batch_size: int = 8
    """Samples in one forward pass."""
    accumulation: int = 1
    """Forward passes in one optimizer step."""
    group_by_length: bool = True
    """Put samples of like length into one batch, to pad less."""
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
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted."""
    eval_every: int = 0
    """Steps between two measurements of the held-out loss during training; 0 measures before and after only."""
    eval_size: int | None = None
    """Held-out samples of such a measurement; null takes all."""
    keep_best: bool = False
    """Measure the held-out loss at every checkpoint and end with the best one."""
    resume: str | None = None
    """Run directory to continue from its last checkpoint; its settings are taken from there."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(
                f"The length of the training is train.steps or train.epochs, found steps={self.steps} and "
                f"epochs={self.epochs}. Set one and make the other null: train.epochs=1 train.steps=null."
            )
        if self.steps is not None:
            check_int("train.steps", self.steps, at_least=1)
        if self.epochs is not None:
            check_number("train.epochs", self.epochs, "a number > 0", 0)
        for name in ("batch_size", "accumulation", "log_every", "keep_checkpoints"):
            check_int(f"train.{name}", getattr(self, name), at_least=1)
        for name in ("seed", "checkpoint_every", "eval_every"):
            check_int(f"train.{name}", getattr(self, name), at_least=0)
        _check_at_most("train.seed", self.seed, SEEDS - 1)
        if self.eval_size is not None:
            check_int("train.eval_size", self.eval_size, at_least=1)
        if self.keep_best and self.eval_every not in (0, self.checkpoint_every):
            raise ConfigError(
                f"train.keep_best measures at every checkpoint (train.checkpoint_every={self.checkpoint_every}), found "
                f"train.eval_every={self.eval_every}. Leave train.eval_every out."
            )
        if self.keep_best and not self.checkpoint_every:
            raise ConfigError(
                "train.keep_best chooses among checkpoints, but train.checkpoint_every is 0. "
                "Set train.checkpoint_every, for example to 50."
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How the model is measured before and after."""

    size: int | None = None
    """Held-out records answered by generation, at most: null all of them, 0 none. The answer loss is taken over all."""
    before: bool = True
    """Measure before training too."""
    batch_size: int = 16
    """Prompts answered at a time."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    extract: Literal["number", "upstream"] = "number"
    """How the final number is read: number, or upstream as the LoRA-GA scripts do, to compare with their accuracy."""

    def __post_init__(self) -> None:
        if self.size is not None:
            check_int("eval.size", self.size, at_least=0)
        check_int("eval.batch_size", self.batch_size, at_least=1)
        check_int("eval.max_new_tokens", self.max_new_tokens, at_least=1)


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
    run_dir: str | None = None
    """Directory to create for the run; null makes runs/<date>-<time>-<adapter>."""
    threads: int | None = None
    """Processor threads; null takes PyTorch's choice."""

    def __post_init__(self) -> None:
        if self.threads is not None:
            check_int("threads", self.threads, at_least=1)
            _check_at_most("threads", self.threads, MOST_THREADS)
        if self.train.steps is not None and self.optim.warmup >= max(1, self.train.steps):
            raise ConfigError(
                f"optim.warmup={self.optim.warmup:g} steps are the whole training (train.steps={self.train.steps}), so "
                "optim.lr would never be reached. Give fewer, or a share below 1 such as optim.warmup=0.05."
            )


def _check_at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise ConfigError(f"{name} must be an integer <= {most}, found {value}. Give a smaller one.")
