"""Low-rank adaptation of PyTorch models: a drop-in for PEFT's LoRA, faster and leaner, right where it is wrong."""

from lorafa.config import LoraConfig, PeftType, TaskType
from lorafa.errors import LoraError
from lorafa.initialize import collect_statistics, initialize
from lorafa.io.state import get_peft_model_state_dict, set_peft_model_state_dict
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
)
from lorafa.optimizers import (
    LoraFAOptimizer,
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from lorafa.peft_model import PeftModel, get_peft_model
from lorafa.peft_starts import replace_lora_weights_loftq
from lorafa.surgery.model import LoraModel, inject_adapter_in_model
from lorafa.surgery.status import get_layer_status, get_model_status
from lorafa.version import VERSION as __version__

__all__ = [
    "ArrowConfig",
    "BdLoraConfig",
    "CordaConfig",
    "EvaConfig",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraError",
    "LoraFAOptimizer",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MontecloraConfig",
    "PeftModel",
    "PeftType",
    "TaskType",
    "VeloraConfig",
    "__version__",
    "collect_statistics",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize",
    "inject_adapter_in_model",
    "replace_lora_weights_loftq",
    "set_peft_model_state_dict",
]
