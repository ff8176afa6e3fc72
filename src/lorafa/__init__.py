"""Low-rank adaptation of PyTorch models: a drop-in for PEFT's LoRA, faster and leaner, right where it is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.version import VERSION as __version__

if TYPE_CHECKING:
    from lorafa.arrow_model import create_arrow_model
    from lorafa.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from lorafa.config import LoraConfig, PeftConfig
    from lorafa.errors import LoraError
    from lorafa.export.job import export_adapter
    from lorafa.io.convert import convert_to_lora, save_as_lora
    from lorafa.io.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
    from lorafa.io.load import check_if_peft_model, load_peft_weights
    from lorafa.io.state import (
        get_base_model_state_dict,
        get_peft_model_state_dict,
        set_base_model_state_dict,
        set_peft_model_state_dict,
    )
    from lorafa.io.stream import MergedFiles, merge_to_folder
    from lorafa.io.verify_folder import check_merged_folder
    from lorafa.mixed_model import PeftMixedModel
    from lorafa.numerics.dropping import dropout_source
    from lorafa.optimizers import (
        LoraFAOptimizer,
        create_lorafa_optimizer,
        create_loraplus_optimizer,
        create_lorapro_optimizer,
        create_preconditioned_adamw,
        create_riemannian_optimizer,
    )
    from lorafa.peft_model import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
    )
    from lorafa.settings.methods import (
        ArrowConfig,
        BdLoraConfig,
        CordaConfig,
        EvaConfig,
        KasaConfig,
        LoftQConfig,
        LoraGAConfig,
        LoraRuntimeConfig,
        MontecloraConfig,
        PeftType,
        TaskType,
        VeloraConfig,
    )
    from lorafa.starts.eva import get_eva_state_dict, initialize_lora_eva_weights
    from lorafa.starts.initialize import collect_joint_statistics, collect_statistics, initialize, start_from
    from lorafa.starts.joint import JointStart, JointStatistics
    from lorafa.starts.loftq import replace_lora_weights_loftq
    from lorafa.starts.preprocess import estimate_gradients, preprocess_corda, preprocess_loraga
    from lorafa.starts.ranks import RankRule, choose_ranks, with_ranks
    from lorafa.starts.statistics import Statistics
    from lorafa.surgery.combination import Combination
    from lorafa.surgery.dequantize import merge_into_dense
    from lorafa.surgery.given import get_peft_config
    from lorafa.surgery.gradients import check_gradients
    from lorafa.surgery.hotswap import check_hotswap_configs_compatible
    from lorafa.surgery.inject import inject_adapter_in_model
    from lorafa.surgery.intruders import reduce_intruder_dimension
    from lorafa.surgery.kappa import KappaTuneSelector, find_kappa_target_modules
    from lorafa.surgery.lora_model import LoraModel
    from lorafa.surgery.mutate import mutate_base, restore_base
    from lorafa.surgery.penalty import penalty
    from lorafa.surgery.precision import cast_mixed_precision_params
    from lorafa.surgery.prepare import prepare_model_for_kbit_training
    from lorafa.surgery.scale import rescale_adapter_scale
    from lorafa.surgery.slots import prepare_model_for_compiled_hotswap
    from lorafa.surgery.status import get_layer_status, get_model_status
    from lorafa.surgery.verify import MergeCheck, check_merge

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
    "Combination",
    "CordaConfig",
    "EvaConfig",
    "JointStart",
    "JointStatistics",
    "KappaTuneSelector",
    "KasaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraError",
    "LoraFAOptimizer",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "MergeCheck",
    "MergedFiles",
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
    "cast_mixed_precision_params",
    "check_gradients",
    "check_hotswap_configs_compatible",
    "check_if_peft_model",
    "check_merge",
    "check_merged_folder",
    "choose_ranks",
    "collect_joint_statistics",
    "collect_statistics",
    "convert_to_lora",
    "create_arrow_model",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_lorapro_optimizer",
    "create_preconditioned_adamw",
    "create_riemannian_optimizer",
    "dropout_source",
    "estimate_gradients",
    "export_adapter",
    "find_kappa_target_modules",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "merge_into_dense",
    "merge_to_folder",
    "mutate_base",
    "penalty",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "reduce_intruder_dimension",
    "replace_lora_weights_loftq",
    "rescale_adapter_scale",
    "restore_base",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "start_from",
    "with_ranks",
]

_HOMES = {
    "ArrowConfig": "lorafa.settings.methods",
    "AutoPeftModel": "lorafa.auto",
    "AutoPeftModelForCausalLM": "lorafa.auto",
    "AutoPeftModelForFeatureExtraction": "lorafa.auto",
    "AutoPeftModelForQuestionAnswering": "lorafa.auto",
    "AutoPeftModelForSeq2SeqLM": "lorafa.auto",
    "AutoPeftModelForSequenceClassification": "lorafa.auto",
    "AutoPeftModelForTokenClassification": "lorafa.auto",
    "BdLoraConfig": "lorafa.settings.methods",
    "Combination": "lorafa.surgery.combination",
    "CordaConfig": "lorafa.settings.methods",
    "EvaConfig": "lorafa.settings.methods",
    "JointStart": "lorafa.starts.joint",
    "JointStatistics": "lorafa.starts.joint",
    "KappaTuneSelector": "lorafa.surgery.kappa",
    "KasaConfig": "lorafa.settings.methods",
    "LoftQConfig": "lorafa.settings.methods",
    "LoraConfig": "lorafa.config",
    "LoraError": "lorafa.errors",
    "LoraFAOptimizer": "lorafa.optimizers",
    "LoraGAConfig": "lorafa.settings.methods",
    "LoraModel": "lorafa.surgery.lora_model",
    "LoraRuntimeConfig": "lorafa.settings.methods",
    "MergeCheck": "lorafa.surgery.verify",
    "MergedFiles": "lorafa.io.stream",
    "MontecloraConfig": "lorafa.settings.methods",
    "PeftConfig": "lorafa.config",
    "PeftMixedModel": "lorafa.mixed_model",
    "PeftModel": "lorafa.peft_model",
    "PeftModelForCausalLM": "lorafa.peft_model",
    "PeftModelForFeatureExtraction": "lorafa.peft_model",
    "PeftModelForQuestionAnswering": "lorafa.peft_model",
    "PeftModelForSeq2SeqLM": "lorafa.peft_model",
    "PeftModelForSequenceClassification": "lorafa.peft_model",
    "PeftModelForTokenClassification": "lorafa.peft_model",
    "PeftType": "lorafa.settings.methods",
    "RankRule": "lorafa.starts.ranks",
    "Statistics": "lorafa.starts.statistics",
    "TaskType": "lorafa.settings.methods",
    "VeloraConfig": "lorafa.settings.methods",
    "cast_mixed_precision_params": "lorafa.surgery.precision",
    "check_gradients": "lorafa.surgery.gradients",
    "check_hotswap_configs_compatible": "lorafa.surgery.hotswap",
    "check_if_peft_model": "lorafa.io.load",
    "check_merge": "lorafa.surgery.verify",
    "check_merged_folder": "lorafa.io.verify_folder",
    "choose_ranks": "lorafa.starts.ranks",
    "collect_joint_statistics": "lorafa.starts.initialize",
    "collect_statistics": "lorafa.starts.initialize",
    "convert_to_lora": "lorafa.io.convert",
    "create_arrow_model": "lorafa.arrow_model",
    "create_lorafa_optimizer": "lorafa.optimizers",
    "create_loraplus_optimizer": "lorafa.optimizers",
    "create_lorapro_optimizer": "lorafa.optimizers",
    "create_preconditioned_adamw": "lorafa.optimizers",
    "create_riemannian_optimizer": "lorafa.optimizers",
    "dropout_source": "lorafa.numerics.dropping",
    "estimate_gradients": "lorafa.starts.preprocess",
    "export_adapter": "lorafa.export.job",
    "find_kappa_target_modules": "lorafa.surgery.kappa",
    "get_base_model_state_dict": "lorafa.io.state",
    "get_eva_state_dict": "lorafa.starts.eva",
    "get_layer_status": "lorafa.surgery.status",
    "get_model_status": "lorafa.surgery.status",
    "get_peft_config": "lorafa.surgery.given",
    "get_peft_model": "lorafa.peft_model",
    "get_peft_model_state_dict": "lorafa.io.state",
    "hotswap_adapter": "lorafa.io.hotswap",
    "hotswap_adapter_from_state_dict": "lorafa.io.hotswap",
    "initialize": "lorafa.starts.initialize",
    "initialize_lora_eva_weights": "lorafa.starts.eva",
    "inject_adapter_in_model": "lorafa.surgery.inject",
    "load_peft_weights": "lorafa.io.load",
    "merge_into_dense": "lorafa.surgery.dequantize",
    "merge_to_folder": "lorafa.io.stream",
    "mutate_base": "lorafa.surgery.mutate",
    "penalty": "lorafa.surgery.penalty",
    "prepare_model_for_compiled_hotswap": "lorafa.surgery.slots",
    "prepare_model_for_kbit_training": "lorafa.surgery.prepare",
    "preprocess_corda": "lorafa.starts.preprocess",
    "preprocess_loraga": "lorafa.starts.preprocess",
    "reduce_intruder_dimension": "lorafa.surgery.intruders",
    "replace_lora_weights_loftq": "lorafa.starts.loftq",
    "rescale_adapter_scale": "lorafa.surgery.scale",
    "restore_base": "lorafa.surgery.mutate",
    "save_as_lora": "lorafa.io.convert",
    "set_base_model_state_dict": "lorafa.io.state",
    "set_peft_model_state_dict": "lorafa.io.state",
    "start_from": "lorafa.starts.initialize",
    "with_ranks": "lorafa.starts.ranks",
}
"""Public name -> the module it is loaded from when it is first asked for (PEP 562): importing lorafa loads nothing."""

if not TYPE_CHECKING:  # or a type checker would take every name, misspelt ones too, for one that is here

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        if name in ("errors", "optimizers"):  # public modules, which `import lorafa` brings along
            return import_module(f"lorafa.{name}")
        raise AttributeError(f"module 'lorafa' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
