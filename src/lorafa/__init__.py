"""Low-rank adaptation of PyTorch models: a drop-in for PEFT's LoRA, faster and leaner, right where it is wrong."""

from lorafa.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from lorafa.config import LoraConfig, PeftConfig, PeftType, TaskType
from lorafa.errors import LoraError
from lorafa.eva_weights import get_eva_state_dict, initialize_lora_eva_weights
from lorafa.io.load import check_if_peft_model, load_peft_weights
from lorafa.io.state import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from lorafa.loftq_weights import replace_lora_weights_loftq
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
    create_lorapro_optimizer,
    create_preconditioned_adamw,
    create_riemannian_optimizer,
)
from lorafa.peft_model import (
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)
from lorafa.preprocess import estimate_gradients, preprocess_corda, preprocess_loraga
from lorafa.ranks import RankRule, choose_ranks, with_ranks
from lorafa.starting import collect_statistics, initialize, start_from
from lorafa.statistics import Statistics
from lorafa.surgery.given import get_peft_config
from lorafa.surgery.model import LoraModel, inject_adapter_in_model
from lorafa.surgery.mutate import mutate_base, restore_base
from lorafa.surgery.prepare import prepare_model_for_kbit_training
from lorafa.surgery.scale import rescale_adapter_scale
from lorafa.surgery.status import get_layer_status, get_model_status
from lorafa.version import VERSION as __version__

__all__ = [
    "ArrowConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
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
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "RankRule",
    "Statistics",
    "TaskType",
    "VeloraConfig",
    "__version__",
    "check_if_peft_model",
    "choose_ranks",
    "collect_statistics",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_lorapro_optimizer",
    "create_preconditioned_adamw",
    "create_riemannian_optimizer",
    "estimate_gradients",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "mutate_base",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "restore_base",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "start_from",
    "with_ranks",
]
