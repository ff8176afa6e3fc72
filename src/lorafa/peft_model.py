"""PeftModel: the adapted model as PEFT shapes it, ``PeftModel.base_model`` (a LoraModel) ``.model`` (the user's)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lorafa.config import LoraConfig
from lorafa.errors import AdapterError, NotAvailableError, refuse, warn
from lorafa.io import load
from lorafa.io.card import update_card
from lorafa.io.fill import fill
from lorafa.mixed_model import MIXED
from lorafa.settings.checks import check_arguments, check_text
from lorafa.storage.hub import UploadOptions, uploaded
from lorafa.surgery.activate import delete_adapter, require_nothing_merged
from lorafa.surgery.adapted import AdaptedModel
from lorafa.surgery.build import Options
from lorafa.surgery.forward import ForwardOfTheWrapped, is_checkpointed, let_inputs_require_grad
from lorafa.surgery.given import lora_config
from lorafa.surgery.lora_model import LoraModel
from lorafa.surgery.plan import taken
from lorafa.surgery.resolve import Resolved, resolve
from lorafa.surgery.stats import Stats, forget_left, given
from lorafa.surgery.walk import adapter_names, uncompiled

if TYPE_CHECKING:
    from typing_extensions import Unpack



class PeftModel(AdaptedModel):
    """Runs like the model it wraps; everything it does not define itself is the wrapped model's."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig | None = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Wrap ``model``; with a config put a new adapter on it, as :func:`get_peft_model` does.

        Raises:
            LoraError: as :func:`get_peft_model`; ``model`` is as it was then.
        """
        super().__init__()
        check_can_wrap(model, "add_adapter" if peft_config is not None else "load_adapter")
        self.base_model = LoraModel(model)
        self.training = model.training
        if peft_config is not None:
            resolved = resolve(model, lora_config(peft_config))
            self._start(resolved, adapter_name, Options(autocast_adapter_dtype, low_cpu_mem_usage))

    def _start(self, resolved: Resolved, name: str, options: Options, stats: Stats | None = None) -> None:
        """Put the first adapter on and let it count."""
        self._add(resolved, name, options, stats)
        self.base_model.set_adapter(name, inference_mode=resolved.config.inference_mode)
        if is_checkpointed(resolved.model):
            let_inputs_require_grad(resolved.model)

    # ---- making, loading and saving

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        torch_device: str | None = None,
        **options: Unpack[load.LoadOptions],
    ) -> PeftModel:
        """Put a saved adapter on ``model``.

        Args:
            model: the base model; changed in place.
            model_id: folder or Hub repository that holds the adapter.
            adapter_name: what it is called from now on.
            is_trainable: train the adapter on; otherwise it is frozen and the model in eval mode.
            config: use this one instead of the stored one.
            autocast_adapter_dtype: keep the adapter in float32 where the base is float16 or bfloat16.
            ephemeral_gpu_offload: not read, nor is ``torch_device``: an adapter goes to the device of its layer.
            low_cpu_mem_usage: make the factors on the meta device before they are filled.
            key_mapping: regular expression -> replacement; in each key of the file, without the prefix
                ``base_model.model.``, the first that occurs is replaced.
            options: see :class:`lorafa.io.load.LoadOptions`.

        Raises:
            SourceError, CheckpointError, ConfigError, TargetError: the adapter cannot be found, read or used here;
                the model is as it was.
        """
        wrapped = cls(model)
        stored = load.read(
            model_id, "from_pretrained", model, is_trainable=is_trainable, config=config, key_mapping=key_mapping,
            **options,
        )  # fmt: skip
        load.take_in(
            wrapped.base_model, stored, adapter_name, Options(autocast_adapter_dtype, low_cpu_mem_usage), options
        )
        wrapped.base_model.set_adapter(adapter_name, inference_mode=not is_trainable)
        if is_trainable and is_checkpointed(model):
            let_inputs_require_grad(model)
        return wrapped if is_trainable else wrapped.eval()

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **options: Unpack[load.LoadOptions],
    ) -> Any:
        """Load a saved adapter beside the others; it does not count until :meth:`set_adapter`.

        An adapter of that name that is already there becomes the one in the file, as resuming a run needs it: its
        values and its scalings, whatever they were. Ranks, layers, formula and start must be those it has; what is
        trained of it, its dropout and whether it counts stay. The arguments are those of :meth:`from_pretrained`.

        Returns:
            ``missing_keys`` and ``unexpected_keys``, both empty: a file that does not fit is refused.

        Raises:
            SourceError, CheckpointError, ConfigError, TargetError: as :meth:`from_pretrained`; nothing was changed.
            AdapterError: the adapter that is there is merged.
        """
        stored = load.read(
            model_id, "load_adapter", self.base_model.model, is_trainable=is_trainable, key_mapping=key_mapping,
            **options,
        )  # fmt: skip
        if adapter_name in self.peft_config:
            fill(self.base_model, stored, adapter_name, options)
        else:
            making = Options(autocast_adapter_dtype, low_cpu_mem_usage)
            load.take_in(self.base_model, stored, adapter_name, making, options)
            self.base_model.set_requires_grad(adapter_name, is_trainable)
        return nn.modules.module._IncompatibleKeys([], [])

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Unpack[load.SaveOptions],
    ) -> None:
        """Write adapters in PEFT's format: "default" into the folder itself, others into sub-folders of their name.

        Args:
            safe_serialization: False warns, and safetensors are written all the same: a pickle can run code.
            selected_adapters: which ones; default all.
            save_embedding_layers: True adds the base's tables, embedding and head, False does not. "auto" adds them if
                the vocabulary was resized since the base was saved, and, as PEFT, what is adapted of them if
                "embed_tokens" or "lm_head" is a target.
            is_main_process: False writes nothing, for all ranks but one. Call it in all of them: what is sharded
                (FSDP2) and not given by ``state_dict`` is gathered from all.
            path_initial_model_for_weight_conversion: not read: a file is plain LoRA on the pristine base, but for DoRA.
            state_dict: take the tensors from this gathered state dict of the PeftModel.
            options: see :class:`lorafa.io.load.SaveOptions`.

        Raises:
            AdapterError: an unknown adapter name, or none at all.
            ConfigError: an argument that does not exist, or the adapter's config was changed and is no longer that of
                its tensors.
            CheckpointError: ``state_dict`` lacks a tensor, only parts of one are here, or a file could not be written;
                what was there before is as it was.
        """
        check_arguments("save_pretrained", options, load.SaveOptions.__optional_keys__)
        if not safe_serialization:
            warn(
                "safe_serialization=False asks for a pickle, which can run code when it is loaded. lorafa writes "
                "safetensors all the same; PEFT and all else that reads adapters read them. Drop the argument."
            )
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self.base_model.say_lost()
        load.save_all(
            self.base_model,
            save_directory,
            names,
            write=is_main_process,
            save_embedding_layers=save_embedding_layers,
            state_dict=state_dict,
        )

    def push_to_hub(self, repo_id: str, **options: Unpack[UploadOptions]) -> Any:
        """Upload what :meth:`save_pretrained` writes, adapters and no base weights, to a repository of the Hub.

        It is made if it is not there. A README.md that it has stays as it is.

        Args:
            repo_id: "owner/name", or a name in your own account.
            options: see :class:`lorafa.storage.hub.UploadOptions`.

        Returns:
            The commit, as ``huggingface_hub.HfApi.upload_folder`` describes it.

        Raises:
            SourceError: the Hub cannot be reached, or refuses.
            ConfigError: an argument that does not exist.
        """
        with uploaded(repo_id, "adapter", options) as upload:
            self.save_pretrained(upload.folder)
        return upload.commit

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write a README.md that names base model and library, or enter both in the head of the one that is there."""
        update_card(output_dir, self.active_peft_config)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        stats: Stats | None = None,
    ) -> None:
        """Add a new adapter, frozen and not counting until :meth:`set_adapter`; ``stats`` as in :func:`get_peft_model`.

        Raises:
            AdapterError: the name is taken or unusable.
            CalibrationError, ConfigError, TargetError: as :func:`get_peft_model`; nothing was changed.
        """
        options = Options(autocast_adapter_dtype, low_cpu_mem_usage)
        self._add(resolve(self.get_base_model(), lora_config(peft_config)), adapter_name, options, stats)

    def _add(self, resolved: Resolved, name: str, options: Options, stats: Stats | None) -> None:
        resolved = resolved.called_by_model()
        self.base_model.inject_resolved(resolved, name, options, given(resolved.model, resolved.config, stats))
        if stats is None and resolved.start.initializer.needs:  # it has taken what a preprocess function left
            forget_left(resolved.model)

    # ---- running

    @ForwardOfTheWrapped
    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Arguments and result are the wrapped model's; ``labels`` is spelled out for trainers that look for it.

        Two kinds of arguments the wrapped model does not see: those of a formula (``alora_offsets``), and
        ``adapter_names``, a list with an entry for each row: the name of the adapter that counts there, whichever is
        active, a list of several, or "__base__" for none. The output and the gradients are those of each row alone.

        Raises:
            AdapterError: ``adapter_names`` is no list with a known name for each row, or an adapter is merged.
            BackendError: an adapted layer cannot tell the rows apart, so that adapters cannot differ from row to row.
        """
        if labels is not None:
            kwargs["labels"] = labels
        return self.base_model.calling(self.base_model, args, kwargs, keeps=torch.is_grad_enabled())

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Arguments and result are those of the wrapped model's ``generate``; ``adapter_names`` as in :meth:`forward`.

        There is one name for each prompt, also where beams or several answers are asked for.
        """
        generate = self.get_base_model().generate
        return self.base_model.calling(generate, args, kwargs, keeps=False, steps=True)  # type: ignore[arg-type]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn activation checkpointing on, of either kind: the embedding's output is made to require a gradient."""
        self._checkpoint("gradient_checkpointing_enable", *args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The newer name of :meth:`gradient_checkpointing_enable` in transformers, which its Trainer calls."""
        self._checkpoint("activation_checkpointing_enable", *args, **kwargs)

    def _checkpoint(self, method: str, *args: Any, **kwargs: Any) -> None:
        model = self.get_base_model()
        getattr(model, method)(*args, **kwargs)
        let_inputs_require_grad(model)

    def resize_token_embeddings(self, *args: Any, **settings: Any) -> Any:
        """As the wrapped model's; see :meth:`LoraModel.resize_token_embeddings` for errors."""
        return self.base_model.resize_token_embeddings(*args, **settings)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether :func:`lorafa.convert_to_lora` can make plain LoRA of an adapter; not of aLoRA, Arrow and GOAT."""
        return self.base_model.supports_lora_conversion(adapter_name)

    def _get_name(self) -> str:  # by which transformers' trainers know whether labels are to be shifted
        return str(self.get_base_model()._get_name())  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def _wrapped_already(model: nn.Module, method: str) -> AdapterError | None:
    """What to say of a PeftModel, whose ``method`` is meant; None of any other model."""
    if not isinstance(model, nn.Module) or not isinstance(uncompiled(model), PeftModel):
        return None
    return AdapterError(f"The model is a PeftModel already. Call its {method}() to put another adapter on it.")


def check_can_wrap(model: nn.Module, method: str) -> None:
    """Raises AdapterError for a PeftModel, whose ``method`` is meant, and for a base that an update is merged into."""
    error = _wrapped_already(model, method)
    if error is not None:
        raise error
    require_nothing_merged(model)


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    stats: Stats | None = None,
) -> PeftModel:
    """Put a new adapter on ``model`` (changed in place), freeze the rest, and return it wrapped.

    Args:
        peft_config: what to adapt and how; it is copied, never changed. PEFT's own LoraConfig is read, too.
        autocast_adapter_dtype: keep adapters in float32 where the base is float16 or bfloat16.
        revision: revision of the base model, for the saved config.
        low_cpu_mem_usage: make the factors on the meta device, to be filled from a file.
        stats: what a data-aware start reads, from :func:`lorafa.collect_statistics`: full name of a target -> name of
            a tensor -> its value.

    Raises:
        TargetError: a pattern matches nothing, or something that cannot carry an adapter.
        CalibrationError: the start reads statistics that are not given, or not of this model.
        ConfigError: ``peft_config`` is no LoraConfig, a setting is wrong or does not go with a layer, or ``stats`` are
            given for a start that reads none.
        NotAvailableError: the config asks for a feature this version does not have.
        AdapterError: the adapter's name is unusable, or the model is a PeftModel already.

    After any of them the model is bit-identical to what it was.
    """
    if mixed:
        raise NotAvailableError(f"mixed=True: {MIXED}")
    check_text("revision", revision)
    config = lora_config(peft_config)
    if revision is not None:
        config = replace(config, revision=revision)
    error = _wrapped_already(model, "add_adapter")
    if error is not None:
        refuse(error, "The adapter went onto it, in the place of one of its name if there was one, and counts alone.")
        options = Options(autocast_adapter_dtype, low_cpu_mem_usage)
        cast(PeftModel, uncompiled(model)).put_anew(config, adapter_name, options, stats)
        return model  # type: ignore[return-value]
    check_can_wrap(model, "add_adapter")
    if isinstance(model, nn.Module) and adapter_name in adapter_names(model):
        refuse(taken(adapter_name), "It was taken off the model, and the new one is in its place.")
        delete_adapter(model, adapter_name)
    resolved = resolve(model, config)
    return adapted(resolved, adapter_name, Options(autocast_adapter_dtype, low_cpu_mem_usage), stats)


def adapted(resolved: Resolved, adapter_name: str, options: Options, stats: Stats | None = None) -> PeftModel:
    """:func:`get_peft_model` for a config that has met its model; errors are those of the parts not yet checked."""
    wrapped = PeftModel(resolved.model)
    wrapped._start(resolved, adapter_name, options, stats)
    return wrapped


PeftModelForCausalLM = PeftModel
PeftModelForSeq2SeqLM = PeftModel
PeftModelForSequenceClassification = PeftModel
PeftModelForTokenClassification = PeftModel
PeftModelForQuestionAnswering = PeftModel
PeftModelForFeatureExtraction = PeftModel
"""PEFT's classes by task. For LoRA they differ in the heads they train, which ``task_type`` of the config says here."""
