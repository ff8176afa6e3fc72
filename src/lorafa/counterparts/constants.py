"""Constants and classes that PEFT has by name, and that lorafa has no other use for."""

from __future__ import annotations

from lorafa.config import LoraConfig
from lorafa.peft_model import PeftModel
from lorafa.settings.methods import PeftType, TaskType
from lorafa.surgery.lora_model import LoraModel

WEIGHTS_NAME = "adapter_model.bin"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
PEFT_TYPE_TO_CONFIG_MAPPING = {PeftType.LORA: LoraConfig}
PEFT_TYPE_TO_TUNER_MAPPING = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_PREFIX_MAPPING = {PeftType.LORA: "lora_"}
MODEL_TYPE_TO_PEFT_MODEL_MAPPING = {str(task.value): PeftModel for task in TaskType}


class PeftWarning(UserWarning):
    """For filters of warnings in scripts; lorafa itself warns by UserWarning."""
