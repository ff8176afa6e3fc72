"""The model inside a PeftModel, for what reads a model of transformers and may be given either."""

from __future__ import annotations

from typing import Any


def inner_model(model: Any) -> Any:
    """The model that a PeftModel is around; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
