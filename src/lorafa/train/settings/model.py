"""Settings of a base model: which one, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lorafa.models import MODELS, QUANTIZERS, loadable
from lorafa.models.kinds import AUTO, KINDS
from lorafa.registry import Registry
from lorafa.settings.checks import check_choice
from lorafa.settings.groups import OpenGroup


@dataclass(frozen=True, kw_only=True)
class ModelConfig(OpenGroup):
    """The base model."""

    group: ClassVar[str] = "model"
    opens: ClassVar[Mapping[str, str]] = {"name": "own"}
    lines: ClassVar[Mapping[str, Registry[Any]]] = {"name": MODELS}
    any_name: ClassVar[str] = "a folder, a Hub id"
    """What may stand after ``model=`` beside the names of ``MODELS``."""

    name: str = "smollm2-135m"
    """Base model: one known by name, a local folder, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model; null takes the newest."""
    kind: str = AUTO
    """What it is: causal, seq2seq (it reads one text and writes another, as T5), classification (it chooses among the
    answers of the rows, as BERT), reward (it scores answers, for objective=reward); auto goes by its config."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights; auto keeps the stored one. Adapters are float32 all the same."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """How attention is computed; auto leaves it to transformers, and on a CPU has causal attention computed in blocks,
    which is faster for short samples."""
    quantize: str | None = None
    """Quantize the linear layers of the base when it is loaded (QLoRA): nf4, int8 (both of lorafa, on every device),
    bnb4, bnb8 (bitsandbytes), torchao_int8 (torchao). Embeddings, the head and what is trained whole stay as they are;
    null quantizes nothing."""
    cache_dir: str | None = None
    """Folder for fetched models; null takes the user's cache."""
    trust_remote_code: bool = False
    """Run code that comes with the model (auto_map in its files). Without it a model that needs such code is refused,
    and nobody is asked. What a run has recorded trusts nothing: say it again to go on with one, or to measure it."""
    check_memory: bool = True
    """Refuse a model whose weights, adapter and optimizer state alone are more than the memory there is, before it is
    loaded; false loads it all the same."""
    add_tokens: list[str] | None = None
    """Texts to make tokens of. Their rows of the embedding, and of a head apart from it, are trained and kept with the
    adapter; the tokenizer that knows them is kept beside it."""
    own: Any = None
    """A model has no settings of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model.kind", self.kind, [AUTO, *KINDS.names()])
        if self.quantize is not None:
            check_choice("model.quantize", self.quantize, QUANTIZERS.names())

    @classmethod
    def settings_of(cls, field: str, chosen: Any) -> type[Any] | None:
        return None

    @classmethod
    def entries(cls, field: str) -> list[str]:
        return loadable()
