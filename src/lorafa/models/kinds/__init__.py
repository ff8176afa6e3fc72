"""Kinds of models that a run trains: what each reads, what its loss is, what it is measured by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from lorafa.models.kinds.entry import Kind

KINDS: Registry[Kind] = Registry(
    "kind of model",
    {
        "causal": "lorafa.models.kinds.causal:CAUSAL",
        "classification": "lorafa.models.kinds.classification:CLASSIFICATION",
        "reward": "lorafa.models.kinds.reward:REWARD",
        "seq2seq": "lorafa.models.kinds.seq2seq:SEQ2SEQ",
    },
)
AUTO = "auto"
"""The setting that leaves the choice to the model's config."""
