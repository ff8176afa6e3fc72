"""The modules of `peft`, the names in each, and where lorafa has what they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_METHODS: Mapping[str, Sequence[str]] = {
    "AdaLoRA": ("AdaLoraConfig", "AdaLoraModel"),
    "AdaMSS": ("AdamssConfig", "AdamssModel"),
    "LLaMA-Adapter": ("AdaptionPromptConfig", "AdaptionPromptModel"),
    "BEFT": ("BeftConfig", "BeftModel"),
    "BOFT": ("BOFTConfig", "BOFTModel"),
    "C3A": ("C3AConfig", "C3AModel"),
    "Cartridge": (
        *("CartridgeConfig", "CartridgeEncoder", "compose_cartridge_adapters", "initialize_kv_prefix_from_text"),
        *("initialize_kv_prefix_from_past_key_values", "prompt_embeddings_from_past_key_values"),
    ),
    "CPT": ("CPTConfig", "CPTEmbedding"),
    "DeFT": ("DeftConfig", "DeftModel"),
    "DeLoRA": ("DeloraConfig", "DeloraModel"),
    "FourierFT": ("FourierFTConfig", "FourierFTModel"),
    "FRoD": ("FrodConfig", "FrodModel"),
    "GLoRA": ("GloraConfig", "GloraModel"),
    "GraLoRA": ("GraloraConfig", "GraloraModel"),
    "HiRA": ("HiraConfig", "HiraModel"),
    "HRA": ("HRAConfig", "HRAModel"),
    "IA3": ("IA3Config", "IA3Model"),
    "Lily": ("LilyConfig", "LilyModel"),
    "LN tuning": ("LNTuningConfig", "LNTuningModel"),
    "LoHa": ("LoHaConfig", "LoHaModel", "LoHaLayer"),
    "LoKr": ("LoKrConfig", "LoKrModel", "LoKrLayer", "factorization"),
    "MiSS": ("MissConfig", "MissModel"),
    "mixed models": ("MixedModel", "COMPATIBLE_TUNER_TYPES", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING"),
    "multitask prompt tuning": (
        "MultitaskPromptEmbedding", "MultitaskPromptTuningConfig", "MultitaskPromptTuningInit",
    ),
    "OFT": ("OFTConfig", "OFTModel"),
    "OSF": ("OSFConfig", "OSFModel"),
    "PEANuT": ("PeanutConfig", "PeanutModel"),
    "Poly": ("PolyConfig", "PolyModel"),
    "prefix tuning": ("PrefixEncoder", "PrefixTuningConfig"),
    "prompt learning": (
        "PromptLearningConfig", "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
        *("bloom_model_postprocess_past_key_value", "starcoder_model_postprocess_past_key_value"), "shift_tokens_right",
    ),
    "prompt tuning": ("PromptEmbedding", "PromptTuningConfig", "PromptTuningInit"),
    "P-tuning": ("PromptEncoder", "PromptEncoderConfig", "PromptEncoderReparameterizationType"),
    "PSOFT": ("PsoftConfig", "PsoftModel"),
    "PVeRA": ("PveraConfig", "PveraModel"),
    "RandLoRA": ("RandLoraConfig", "RandLoraModel"),
    "RoAd": ("RoadConfig", "RoadModel"),
    "Shadow": ("ShadowConfig", "ShadowModel"),
    "SHiRA": ("ShiraConfig", "ShiraModel"),
    "Supertuning": ("SupertuningConfig", "SupertuningModel"),
    "TinyLoRA": ("TinyLoraConfig", "TinyLoraModel"),
    "trainable tokens without LoRA": ("TrainableTokensConfig", "TrainableTokensModel", "TrainableTokensLayer"),
    "UniLoRA": ("UniLoraConfig", "UniLoraModel"),
    "VB-LoRA": ("VBLoRAConfig", "VBLoRAModel"),
    "VeRA": ("VeraConfig", "VeraModel"),
    "WaveFT": ("WaveFTConfig", "WaveFTModel"),
    "X-LoRA": ("XLoraConfig", "XLoraModel"),
    "methods of one's own by PEFT's registry": ("register_peft_method",),
}  # fmt: skip

_PREFIXES = (
    *("TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING", "bloom_model_postprocess_past_key_value"),
    "starcoder_model_postprocess_past_key_value",
)
_OTHER_METHODS = (
    *("ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HRA"),
    *("IA3", "LILY", "LNTUNING", "LOHA", "LOKR", "MISS", "OFT", "PEANUT", "POLY", "PSOFT", "PVERA", "RANDLORA"),
    *("ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
)
_USUAL_LAYERS = (
    *(f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING" for method in _OTHER_METHODS),
    *("TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING",),
)
_QUANTIZERS: Mapping[str, str] = {
    "aqlm": "AqlmLoraLinear", "awq": "AwqLoraLinear", "eetq": "EetqLoraLinear", "gptq": "GPTQLoraLinear",
    "hqq": "HqqLoraLinear", "inc": "IncLoraLinear", "te": "TeLinear", "tp_layer": "LoraParallelLinear",
}  # fmt: skip
"""Modules of `peft.tuners.lora` -> the class of layer in it, of libraries that lorafa puts no adapters on."""
_QUANTIZATION = (
    *("get_gptqmodel_quant_linear", "get_quantization_config", "get_quantization_kwargs"),
    *("quantization_extra_repr", "resolve_quantization_backend"),
)
_INNER = {
    "peft.tuners._buffer_dict": ("BufferDict",),
    "peft.tuners.lora.arrow": (
        *("ArrowLoraLinearLayer", "check_loaded_lora_compatibility_arrow", "ensure_adapters_target_linear_layers_only"),
    ),
    "peft.tuners.lora.corda": ("calib_cov_distribution", "collect_eigens", "crop_corda_eigens"),
    "peft.tuners.lora.dora": ("DoraConv2dLayer", "DoraConv3dLayer", "DoraEmbeddingLayer", "DoraLinearLayer"),
    "peft.tuners.lora.monteclora": ("MontecloraSampler",),
    "peft.tuners.lora.velora": ("VeloraFunction",),
    "peft.tuners.tuners_utils": (
        *("_find_minimal_target_modules", "_maybe_include_all_linear_layers", "clone_module", "replicate_layers"),
    ),
    "peft.utils": (
        *("ALLOWED_COMPUTE_DTYPES", "UPCAST_DTYPES", "_freeze_adapter", "_is_valid_match"),
        *("_prepare_prompt_learning_config", "_set_adapter", "_set_trainable", "map_cache_to_layer_device_map"),
        *("set_additional_trainable_modules", *_QUANTIZATION),
    ),
    "peft.utils.incremental_pca": ("IncrementalPCA",),
    "peft.utils.integrations": ("map_cache_to_layer_device_map", "skip_init_on_device"),
    "peft.utils.loftq_utils": ("loftq_init",),
    "peft.utils.quantization_utils": _QUANTIZATION,
    "peft.utils.transformers_weight_conversion": ("FlattenDims", "PeftConcatenate", "PermuteDims"),
}
"""What PEFT itself works by, and documents or tests as names: module -> names."""

ABSENT: Mapping[str, Sequence[str]] = {
    **_METHODS,
    "the usual layers of other methods": _USUAL_LAYERS,
    "quantizers that adapters do not go on here": tuple(_QUANTIZERS.values()),
    "the inner working of PEFT": tuple(name for names in _INNER.values() for name in names),
}
"""What lorafa has nothing for: what it belongs to -> names."""

_FOLDERS = {
    "adalora": "AdaLoRA", "adamss": "AdaMSS", "adaption_prompt": "LLaMA-Adapter", "beft": "BEFT", "boft": "BOFT",
    "c3a": "C3A", "cartridge": "Cartridge", "cpt": "CPT", "deft": "DeFT", "delora": "DeLoRA",
    "fourierft": "FourierFT", "frod": "FRoD", "glora": "GLoRA", "gralora": "GraLoRA", "hira": "HiRA", "hra": "HRA",
    "ia3": "IA3", "lily": "Lily", "ln_tuning": "LN tuning", "loha": "LoHa", "lokr": "LoKr", "miss": "MiSS",
    "mixed": "mixed models", "multitask_prompt_tuning": "multitask prompt tuning", "oft": "OFT", "osf": "OSF",
    "p_tuning": "P-tuning", "peanut": "PEANuT", "poly": "Poly", "prefix_tuning": "prefix tuning",
    "prompt_tuning": "prompt tuning", "psoft": "PSOFT", "pvera": "PVeRA", "randlora": "RandLoRA", "road": "RoAd",
    "shadow": "Shadow", "shira": "SHiRA", "supertuning": "Supertuning", "tinylora": "TinyLoRA",
    "trainable_tokens": "trainable tokens without LoRA", "unilora": "UniLoRA", "vblora": "VB-LoRA", "vera": "VeRA",
    "waveft": "WaveFT", "xlora": "X-LoRA",
}  # fmt: skip
"""Folders below `peft.tuners` of what is absent."""

_CONFIGS = (
    *("ArrowConfig", "BdLoraConfig", "EvaConfig", "KasaConfig", "LoftQConfig", "LoraConfig", "LoraGAConfig"),
    *("LoraRuntimeConfig", "MontecloraConfig", "VeloraConfig"),
)
_AUTO = (
    *("AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction"),
    *("AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification"),
    "AutoPeftModelForTokenClassification",
)
_MODELS = (
    *("PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering"),
    *("PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification"),
)
_STATUS = ("get_layer_status", "get_model_status")
_STATE = (
    *("get_base_model_state_dict", "get_peft_model_state_dict", "load_peft_weights"),
    *("set_base_model_state_dict", "set_peft_model_state_dict"),
)
_STARTS = ("get_eva_state_dict", "initialize_lora_eva_weights", "preprocess_loraga")
_CONVERSION = ("convert_to_lora", "save_as_lora")
_TYPES = ("PeftType", "TaskType")
_ERRORS = ("NoMatchingPeftModuleError", "PeftError", "PeftWarning")
_MAPPINGS = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING")
_TARGETS = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
_FILES = ("CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME")
_SHORTHAND = "INCLUDE_LINEAR_LAYERS_SHORTHAND"
_WRAPPERS = ("AuxiliaryTrainingWrapper", "ModulesToSaveWrapper", "TrainableTokensWrapper")
_OTHER = (
    *("_get_batch_size", "_get_input_embeddings_name", "_get_submodules", "cast_mixed_precision_params"),
    *("id_tensor_storage", "infer_device", "prepare_model_for_kbit_training", "transpose"),
)
_LAYERS = (
    *("Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer", "MultiheadAttention", "ParamWrapper"),
)
_QUANTIZED = ("Linear4bit", "Linear8bitLt", "TorchaoLoraLinear")
_FUNCTIONAL = (
    *("cast_adapter_dtype", "delete_adapter", "get_peft_model_state_dict", "inject_adapter_in_model", "set_adapter"),
    *("set_peft_model_state_dict", "set_requires_grad"),
)
_HOTSWAP = (
    *("check_hotswap_configs_compatible", "hotswap_adapter", "hotswap_adapter_from_state_dict"),
    "prepare_model_for_compiled_hotswap",
)
_MERGE_UTILS = (
    *("calculate_majority_sign_mask", "dare_linear", "dare_ties", "disjoint_merge", "magnitude_prune", "prune"),
    *("task_arithmetic", "ties"),
)
_ABSENT = tuple(name for names in _METHODS.values() for name in names)
_KAPPA = ("KappaTuneSelector", "find_kappa_target_modules")

_SERVED: Mapping[str, Sequence[str]] = {
    "peft": (
        *_AUTO, *_MODELS, *_CONFIGS, *_STATUS, *_STATE, *_STARTS, *_CONVERSION, *_TYPES, *_ERRORS, *_MAPPINGS,
        *("MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "LoraModel", "PeftConfig", "PeftMixedModel", "create_arrow_model"),
        *("cast_mixed_precision_params", "get_peft_config", "get_peft_model", "inject_adapter_in_model"),
        *("prepare_model_for_kbit_training", "replace_lora_weights_loftq", *_KAPPA, *_ABSENT),
    ),
    "peft.auto": _AUTO,
    "peft.config": ("CONFIG_NAME", "PeftConfig", "PeftConfigMixin", "PromptLearningConfig"),
    "peft.functional": _FUNCTIONAL,
    "peft.helpers": (
        *("DoraCaching", "MontecloraTrainerMixin", "check_if_peft_model", "disable_input_dtype_casting"),
        *("rescale_adapter_scale", "update_forward_signature", "update_generate_signature", "update_signature"),
        *_KAPPA,
    ),
    "peft.import_utils": (
        *("is_bnb_4bit_available", "is_bnb_available", "is_diffusers_available", "is_torchao_available"),
        *("is_eetq_available", "is_gptqmodel_available", "is_hqq_available", "is_aqlm_available", "is_xpu_available"),
    ),
    "peft.mapping": (
        *_MAPPINGS, "PEFT_TYPE_TO_PREFIX_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING", "get_peft_config",
        "inject_adapter_in_model",
    ),
    "peft.mapping_func": ("MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "get_peft_model"),
    "peft.mixed_model": ("PeftMixedModel",),
    "peft.optimizers": ("create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"),
    "peft.optimizers.lorafa": ("LoraFAOptimizer", "create_lorafa_optimizer"),
    "peft.optimizers.loraplus": ("create_loraplus_optimizer",),
    "peft.optimizers.riemannian": ("create_riemannian_optimizer",),
    "peft.peft_model": (*_MODELS, *_STATUS, "TunerLayerStatus", "TunerModelStatus"),
    "peft.tuners": (*_CONFIGS, "LoraModel", *_CONVERSION, *_STARTS, "create_arrow_model", *_ABSENT),
    **{f"peft.tuners.{folder}": ABSENT[subject] for folder, subject in _FOLDERS.items()},
    **{f"peft.tuners.{folder}.config": ABSENT[subject] for folder, subject in _FOLDERS.items()},
    **{f"peft.tuners.{folder}.layer": ABSENT[subject] for folder, subject in _FOLDERS.items()},
    **{f"peft.tuners.{folder}.model": ABSENT[subject] for folder, subject in _FOLDERS.items()},
    "peft.tuners.lora": (
        *_CONFIGS, *_LAYERS, *_QUANTIZED, *_QUANTIZERS.values(), *_CONVERSION, *_STARTS, "LoraModel",
        "create_arrow_model",
    ),
    **{f"peft.tuners.lora.{module}": (name,) for module, name in _QUANTIZERS.items()},
    "peft.tuners.lora.bnb": _QUANTIZED[:2],
    "peft.tuners.lora.torchao": _QUANTIZED[2:],
    "peft.tuners.lora.arrow": ("create_arrow_model",),
    "peft.tuners.lora.config": (*_CONFIGS, "CordaConfig"),
    "peft.tuners.lora.conversion": _CONVERSION,
    "peft.tuners.lora.corda": ("preprocess_corda",),
    "peft.tuners.lora.eva": ("get_eva_state_dict", "initialize_lora_eva_weights"),
    "peft.tuners.lora.intruders": ("reduce_intruder_dimension",),
    "peft.tuners.lora.layer": (*_LAYERS, "LoraVariant"),
    "peft.tuners.lora.loraga": ("estimate_gradients", "preprocess_loraga"),
    "peft.tuners.lora.model": (_TARGETS, "LoraModel"),
    "peft.tuners.tuners_utils": (
        *("BaseTuner", "BaseTunerLayer", "cast_adapter_dtype", "check_target_module_exists", "delete_adapter"),
        *("inspect_matched_modules", "onload_layer", "set_adapter", "set_requires_grad"),
    ),
    "peft.utils": (
        *_FILES, *_ERRORS, *_TYPES, *_WRAPPERS, *_STATE, *_OTHER, _TARGETS, *_USUAL_LAYERS, _SHORTHAND,
        "register_peft_method",
        *("replace_lora_weights_loftq", "shift_tokens_right", *_PREFIXES),
    ),
    "peft.utils.constants": (
        *_FILES, _TARGETS, *_USUAL_LAYERS, _SHORTHAND,
        *("EMBEDDING_LAYER_NAMES", "SEQ_CLS_HEAD_NAMES", "TOKENIZER_CONFIG_NAME"),
    ),
    "peft.utils.error": ("NoMatchingPeftModuleError", "PeftError"),
    "peft.utils.hotswap": _HOTSWAP,
    "peft.utils.integrations": (
        *("dequantize_bnb_weight", "dequantize_module_weight", "gather_params_ctx", "init_empty_weights"),
    ),
    "peft.utils.loftq_utils": ("replace_lora_weights_loftq",),
    "peft.utils.merge_utils": _MERGE_UTILS,
    "peft.utils.other": (
        *_FILES, *_WRAPPERS, *_OTHER, _TARGETS, _SHORTHAND, "EMBEDDING_LAYER_NAMES",
        *("fsdp_auto_wrap_policy", "get_pattern_key", "match_target_against_key", "str_to_bool"),
        *_USUAL_LAYERS, *_PREFIXES,
    ),
    "peft.utils.peft_types": (*_TYPES, "register_peft_method"),
    "peft.utils.save_and_load": (*_STATE, *_FILES[1:]),
    "peft.utils.transformers_weight_conversion": (
        *("build_peft_weight_mapping", "convert_peft_adapter_state_dict_for_transformers"),
        "convert_peft_config_for_transformers",
    ),
    "peft.utils.warning": ("PeftWarning",),
}  # fmt: skip

MODULES: Mapping[str, Sequence[str]] = {
    module: (*_SERVED.get(module, ()), *_INNER.get(module, ())) for module in (*_SERVED, *_INNER)
}
"""Full names of modules -> the names in them that scripts import."""

_COUNTERPARTS: Mapping[str, Sequence[str]] = {
    "constants": (
        *("EMBEDDING_LAYER_NAMES", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "MODEL_TYPE_TO_PEFT_MODEL_MAPPING"),
        *("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"),
        *("PeftType", "PeftWarning", "SEQ_CLS_HEAD_NAMES", "TOKENIZER_CONFIG_NAME", "WEIGHTS_NAME"),
    ),
    "functional": ("cast_adapter_dtype", "delete_adapter", "inject_adapter_in_model", "set_adapter"),
    "helpers": (
        *("DoraCaching", "MontecloraTrainerMixin", "disable_input_dtype_casting", "update_forward_signature"),
        *("update_generate_signature", "update_signature"),
    ),
    "layers": ("BaseTunerLayer", "Conv1d", "Conv2d", "Conv3d", *_QUANTIZED),
    "matching": (
        *("check_target_module_exists", "get_pattern_key", "inspect_matched_modules", "match_target_against_key"),
    ),
    "sharding": ("fsdp_auto_wrap_policy",),
    "utilities": (
        *("_get_batch_size", "_get_input_embeddings_name", "_get_submodules", "dequantize_bnb_weight"),
        *("dequantize_module_weight", "gather_params_ctx", "id_tensor_storage", "infer_device", "init_empty_weights"),
        *("is_aqlm_available", "is_bnb_4bit_available", "is_bnb_available", "is_diffusers_available"),
        *("is_eetq_available", "is_gptqmodel_available", "is_hqq_available", "is_torchao_available"),
        *("is_xpu_available", "onload_layer", "str_to_bool", "transpose"),
    ),
    "weight_conversion": (
        *("build_peft_weight_mapping", "convert_peft_adapter_state_dict_for_transformers"),
        "convert_peft_config_for_transformers",
    ),
}
"""Files of `lorafa.counterparts`, which has what nothing else in lorafa needs -> names."""

HOMES: Mapping[str, str] = {
    "AuxiliaryTrainingWrapper": "lorafa.layers.wrapper:Wrapper",
    "BaseTuner": "lorafa.surgery.lora_model:LoraModel",
    "CONFIG_NAME": "lorafa.config:CONFIG_NAME",
    "Embedding": "lorafa.layers.embedding:LoraEmbedding",
    "Linear": "lorafa.layers.linear:LoraLinear",
    "LoraLayer": "lorafa.layers.base:LoraLayer",
    "LoraVariant": "lorafa.adapter:Variant",
    "ModulesToSaveWrapper": "lorafa.layers.saved:ModulesToSaveWrapper",
    "MultiheadAttention": "lorafa.layers.attention:LoraAttention",
    "NoMatchingPeftModuleError": "lorafa.errors:TargetError",
    "ParamWrapper": "lorafa.layers.experts:LoraExperts",
    "PeftConfigMixin": "lorafa.config:LoraConfig",
    "PeftError": "lorafa.errors:LoraError",
    "SAFETENSORS_WEIGHTS_NAME": "lorafa.io.find:WEIGHTS_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": "lorafa.surgery.architectures:DEFAULT_TARGETS",
    "TrainableTokensWrapper": "lorafa.layers.tokens:TrainableTokensWrapper",
    "TunerLayerStatus": "lorafa.surgery.status:LayerStatus",
    "TunerModelStatus": "lorafa.surgery.status:ModelStatus",
    "estimate_gradients": "lorafa.starts.preprocess:preprocess_loraga",  # PEFT's leaves them for get_peft_model, too
    "set_requires_grad": "lorafa.surgery.activate:set_requires_grad",
    **{
        name: f"lorafa.numerics.task_arithmetic:{name}"
        for name in (
            *("calculate_majority_sign_mask", "dare_linear", "dare_ties", "disjoint_merge", "magnitude_prune"),
            *("prune", "task_arithmetic", "ties"),
        )
    },
    **{name: f"lorafa.counterparts.{file}:{name}" for file, names in _COUNTERPARTS.items() for name in names},
}
"""Names that are not in `lorafa` itself -> where they are; all others are lorafa's of the same name."""
