"""Settings of single methods, nested in :class:`lorafa.LoraConfig`; names, fields and defaults are PEFT's.

Fields that PEFT does not have come last and are marked.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

from lorafa.errors import ConfigError
from lorafa.settings.checks import (
    check_choice,
    check_flag,
    check_int,
    check_keys,
    check_number,
    found,
    names,
    path_text,
)

T = TypeVar("T")
OWN = {"of_peft": False}
"""Marks a field that PEFT's class of the same name does not have; files hold it where it is not at its default."""


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


def from_nested(config_class: type[T], value: object, name: str) -> T | None:
    """The nested config as an object: from itself, from the dict a file holds, or None.

    Raises:
        ConfigError: another type, or a dict with a key the class does not have.
    """
    if value is None or isinstance(value, config_class):
        return value
    if not isinstance(value, dict):
        kind = config_class.__name__
        raise ConfigError(
            f"{name} must be {kind}(...), a dict or None, found {found(value)}. Pass {name}={kind}() for the defaults."
        )
    known = {f.name: f for f in fields(config_class)}  # type: ignore[arg-type]
    check_keys(f"{name} ({config_class.__name__})", value, known)
    config = config_class(**{key: item for key, item in value.items() if known[key].init})
    for key, item in value.items():
        if not known[key].init:  # set by the library after construction, stored all the same
            setattr(config, key, item)
    return config


def as_written(value: object) -> object:
    """What a file holds of a nested config: a dict without the fields PEFT does not have where they are at their
    default. Other values as they are."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    hidden = {f.name for f in fields(value) if f.metadata == OWN and getattr(value, f.name) == f.default}
    return {name: item for name, item in asdict(value).items() if name not in hidden}


@dataclass
class LoraRuntimeConfig:
    """How to run, not what to compute: never saved."""

    ephemeral_gpu_offload: bool = False
    """Compute DoRA's starting norms on the GPU for weights that live in CPU memory."""

    def __post_init__(self) -> None:
        check_flag("ephemeral_gpu_offload", self.ephemeral_gpu_offload)


@dataclass
class LoftQConfig:
    """LoftQ (arXiv:2310.08659): quantize the base, fit the adapter to the quantization error."""

    loftq_bits: int = 4
    """Bits a weight is quantized to: 4 or 8."""
    loftq_iter: int = 1
    """Alternations of quantizing and fitting."""

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8) or isinstance(self.loftq_bits, bool):
            raise ConfigError(f"loftq_bits must be 4 or 8, found {found(self.loftq_bits)}. Pass loftq_bits=4.")
        check_int("loftq_iter", self.loftq_iter, at_least=1)


@dataclass
class EvaConfig:
    """EVA (arXiv:2410.07170): A starts at the principal directions of a layer's inputs, ranks by explained variance."""

    rho: float = 2.0
    """A layer's rank may grow up to rho * r; 1.0 keeps all ranks equal."""
    tau: float = 0.99
    """Cosine similarity of successive directions at which a layer counts as converged."""
    use_label_mask: bool = True
    """Leave out positions whose label is label_mask_value."""
    label_mask_value: int = -100
    """The label of positions that are left out."""
    whiten: bool = False
    """Divide direction i by the root of its singular value, sqrt(sigma_i), as in PEFT: this brings the variances of the
    projections nearer to each other, not to 1."""
    adjust_scaling_factors: bool = True
    """Change alpha with the layer's rank, so that its scaling stays as configured, with rsLoRA too."""

    def __post_init__(self) -> None:
        check_number("rho", self.rho, "a number >= 1", 1.0, closed="[")
        check_number("tau", self.tau, "a number in [0, 1]", 0.0, 1.0, closed="[]")
        check_int("label_mask_value", self.label_mask_value)
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            check_flag(name, getattr(self, name))


@dataclass
class CordaConfig:
    """CorDA (arXiv:2406.05223): start from the SVD of the weight times the covariance of its inputs."""

    cache_file: str | os.PathLike[str] | None = None
    """Where PEFT keeps the decompositions between runs. Here it is a second name for covariance_file, read where that
    is None: decompositions are made of the covariances, for the rank at hand, and not kept."""
    covariance_file: str | os.PathLike[str] | None = None
    """File that keeps the covariances between runs; about as large as the model."""
    corda_method: str = "ipm"
    """"ipm" adapts the directions that matter for the data, "kpm" the ones that matter least."""
    verbose: bool = False
    """No effect, accepted for PEFT's sake: it shows a bar over the decompositions there, which are a part of making the
    adapter here. ``progress`` of :func:`lorafa.collect_statistics` shows one over the data."""
    use_float16_for_covariance: bool = False
    """Half the memory of the covariances, at the risk of instability."""
    prune_temporary_fields: bool = True
    """No effect, accepted for PEFT's sake: it removes from the modules what was kept on them. Here nothing is."""

    def __post_init__(self) -> None:
        check_choice("corda_method", self.corda_method, ("ipm", "kpm"))
        for name in ("cache_file", "covariance_file"):
            setattr(self, name, path_text(name, getattr(self, name)))
        for name in ("verbose", "use_float16_for_covariance", "prune_temporary_fields"):
            check_flag(name, getattr(self, name))


@dataclass
class LoraGAConfig:
    """LoRA-GA (arXiv:2407.05000): start from the singular vectors of the first gradient."""

    direction: str = "ArB2r"
    """Which singular vectors A and B take: "ArB2r", "A2rBr", "ArBr" (alternating) or "random"."""
    scale: str = "stable"
    """"stable" (section 3.3 of the paper), "weight_svd", "gd_scale" or "unit"."""
    stable_gamma: float = 16
    """gamma of "stable": larger means a smaller start."""

    def __post_init__(self) -> None:
        check_choice("direction", self.direction, ("ArB2r", "A2rBr", "ArBr", "random"))
        check_choice("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        check_number("stable_gamma", self.stable_gamma, "a number > 0", 0)


@dataclass
class ArrowConfig:
    """Arrow (arXiv:2405.11157): route every token to the adapters whose direction fits it; GenKnowSub optional."""

    top_k: int = 3
    """Adapters a token is routed to."""
    router_temperature: float = 1.0
    """Temperature of the softmax over the routed adapters."""
    use_gks: bool = False
    """Subtract the mean of the general adapters first (GenKnowSub)."""
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None
    """No effect, accepted for PEFT's sake: it seeds the power iterations that find directions there. Here they are
    exact."""
    exact_gks: bool = field(default=False, metadata=OWN)
    """Subtract the mean of the general adapters' updates, s B A, and not, as PEFT does, that of their A from A and that
    of their B from B, which leaves products of the two."""
    normalize_tokens: bool = field(default=False, metadata=OWN)
    """Divide the scores of a token by its length, so that the temperature means the same for all tokens."""

    def __post_init__(self) -> None:
        check_int("top_k", self.top_k, at_least=1)
        check_number("router_temperature", self.router_temperature, "a number > 0", 0)
        for name in ("use_gks", "exact_gks", "normalize_tokens"):
            check_flag(name, getattr(self, name))
        if self.exact_gks and not self.use_gks:
            raise ConfigError("exact_gks=True says how to subtract general adapters, and use_gks is False. Set both.")
        if self.rng_seed is not None:
            check_int("rng_seed", self.rng_seed)


@dataclass
class BdLoraConfig:
    """BD-LoRA: block-diagonal A or B, so that sharded serving needs no communication for the adapter."""

    target_modules_bd_a: list[str] | None = None
    """Modules with a block-diagonal A: those sharded by rows (output and down projections)."""
    target_modules_bd_b: list[str] | None = None
    """Modules with a block-diagonal B: those sharded by columns (query, key, value, up and gate projections)."""
    nblocks: int = 1
    """Number of blocks: the sharding degree when serving."""
    match_strict: bool = True
    """Every target must be in one of the two lists."""

    def __post_init__(self) -> None:
        lists: dict[str, Any] = {name: getattr(self, name) for name in ("target_modules_bd_a", "target_modules_bd_b")}
        sets = [set(names(name, value)) for name, value in lists.items() if value is not None]
        both = sorted(set.intersection(*sets)) if len(sets) == 2 else []
        if both:
            raise ConfigError(
                f"{both[0]!r} is in target_modules_bd_a and in target_modules_bd_b, but only one of A and B can be "
                "block-diagonal. Remove it from one of the two lists."
            )
        check_int("nblocks", self.nblocks, at_least=1)
        check_flag("match_strict", self.match_strict)


@dataclass
class VeloraConfig:
    """VeLoRA (arXiv:2405.17991): keep compressed inputs for the gradient of A."""

    num_groups: int = 64
    """Groups the input features are split into, fewer than there are; more groups: smaller error, more memory."""
    scale: float = 1.0
    """Factor on the reconstructed inputs."""
    init_type: str = "batch_average"
    """Where the projection comes from: "batch_average" (every step), "batch_average_once" or "random"."""

    def __post_init__(self) -> None:
        check_int("num_groups", self.num_groups, at_least=1)
        check_number("scale", self.scale, "a number > 0", 0)
        check_choice("init_type", self.init_type, ("batch_average", "batch_average_once", "random"))

    @property
    def goes_by_batches(self) -> bool:
        """Whether the projection is the mean of a batch."""
        return self.init_type.startswith("batch")


@dataclass
class KasaConfig:
    """KaSA (arXiv:2412.06071): drop the base's smallest singular values, learn a diagonal between A and B."""

    beta: float = 1e-4
    """Weight of the penalty on the diagonal, sum(diag^2) (equations 9 and 10)."""
    gamma: float = 1e-3
    """Weight of the penalty on A and B being far from orthogonal (equation 11)."""

    def __post_init__(self) -> None:
        check_number("beta", self.beta, "a number >= 0", 0, closed="[")
        check_number("gamma", self.gamma, "a number >= 0", 0, closed="[")


@dataclass
class MontecloraConfig:
    """MonteCLoRA: Monte Carlo perturbations of A while training, with learned spread."""

    num_samples: int = 8
    """Samples drawn per forward pass."""
    use_entropy: bool = False
    """Add the sum of the squared sample weights to the loss, which keeps them from collapsing on one sample."""
    dirichlet_prior: float = 0.1
    """Concentration of the prior over sample weights."""
    sample_scaler: float = 1e-4
    """Size of the perturbations, which multiplies their standard deviation."""
    kl_loss_weight: float = 1e-5
    """Weight of the KL divergence to the prior in the loss."""
    buffer_size: int = 150
    """No effect, accepted for PEFT's sake: it draws so many samples in advance and keeps them. Here they are drawn when
    they are needed."""

    def __post_init__(self) -> None:
        check_int("num_samples", self.num_samples, at_least=1)
        check_int("buffer_size", self.buffer_size, at_least=1)
        check_number("dirichlet_prior", self.dirichlet_prior, "a number > 0", 0)
        check_number("sample_scaler", self.sample_scaler, "a number >= 0", 0, closed="[")
        check_number("kl_loss_weight", self.kl_loss_weight, "a number >= 0", 0, closed="[")
        check_flag("use_entropy", self.use_entropy)
