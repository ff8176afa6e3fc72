"""PeftModel: the adapted model as PEFT shapes it, ``PeftModel.base_model`` (a LoraModel) ``.model`` (the user's)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lorafa.config import LoraConfig, PeftType
from lorafa.errors import AdapterError, NotAvailableError
from lorafa.io.adapter_files import StoredAdapter, check_fits_base, note_history, read_adapter, save_adapter
from lorafa.io.card import write_card
from lorafa.io.peft_format import keeps_embeddings, load_tensors, misfit
from lorafa.io.state import materialize
from lorafa.statistics import forget_kept, given
from lorafa.storage import HubOptions
from lorafa.surgery.adapters import disabled, require_adapters, require_nothing_merged, require_unmerged
from lorafa.surgery.build import Options, Stats
from lorafa.surgery.forward import ForwardOfTheWrapped, is_checkpointed, let_inputs_require_grad
from lorafa.surgery.model import LoraModel
from lorafa.surgery.status import (
    LayerStatus,
    ModelStatus,
    count_parameters,
    get_layer_status,
    get_model_status,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PeftModel(nn.Module):
    """Runs like the model it wraps; everything it does not define itself is the wrapped model's."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap without adding an adapter; use :func:`get_peft_model` or :meth:`from_pretrained`."""
        super().__init__()
        self.base_model = LoraModel(model)
        self.training = model.training

    # ---- making and loading

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        torch_device: str | None = None,
        ephemeral_gpu_offload: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        ignore_base_mismatch: bool = False,
        **hub: Unpack[HubOptions],
    ) -> PeftModel:
        """Put a saved adapter on ``model``.

        Args:
            model: the base model; changed in place.
            model_id: folder or Hub repository that holds the adapter.
            adapter_name: what it is called from now on.
            is_trainable: train the adapter on; otherwise it is frozen and the model in eval mode.
            config: use this one instead of the stored one.
            autocast_adapter_dtype: keep the adapter in float32 where the base is float16 or bfloat16.
            low_cpu_mem_usage: make the factors on the meta device before they are filled.
            torch_device: not read, nor is ``ephemeral_gpu_offload``: an adapter goes to the device of its layer.
            key_mapping: regular expression -> replacement, applied to every key of the file in turn.
            subfolder: where in the folder or repository the adapter is.
            ignore_base_mismatch: load even if the base weights are not those the adapter was made for.
            allow_pickle: also read a ``.bin`` file.
            hub: revision, token, cache_dir, local_files_only, force_download, endpoint.

        Raises:
            SourceError, CheckpointError, ConfigError, TargetError: the adapter cannot be found, read or used here;
                the model is as it was.
        """
        _check_can_wrap(model, "load_adapter")
        stored = read_adapter(
            model_id, subfolder=subfolder, config=config, allow_pickle=allow_pickle, key_mapping=key_mapping, **hub
        )
        wrapped = cls(model)
        wrapped._take_in(stored, adapter_name, Options(autocast_adapter_dtype, low_cpu_mem_usage), ignore_base_mismatch)
        wrapped.base_model.set_adapter(adapter_name, inference_mode=not is_trainable)
        if is_trainable and is_checkpointed(model):
            let_inputs_require_grad(model)
        return wrapped if is_trainable else wrapped.eval()

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        torch_device: str | None = None,
        ephemeral_gpu_offload: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        subfolder: str | None = None,
        allow_pickle: bool = False,
        ignore_base_mismatch: bool = False,
        **hub: Unpack[HubOptions],
    ) -> Any:
        """Load a saved adapter beside the others; it does not count until :meth:`set_adapter`.

        An adapter of that name that is already there is filled from the file, as resuming a run needs it; the file's
        rank and layers must then be those it has. The arguments are those of :meth:`from_pretrained`.

        Returns:
            ``missing_keys`` and ``unexpected_keys``, both empty: a file that does not fit is refused.

        Raises:
            SourceError, CheckpointError, ConfigError, TargetError: as :meth:`from_pretrained`; nothing was changed.
            AdapterError: the adapter that is there is merged.
        """
        stored = read_adapter(model_id, subfolder=subfolder, allow_pickle=allow_pickle, key_mapping=key_mapping, **hub)
        if adapter_name in self.peft_config:
            self._fill(stored, adapter_name, ignore_base_mismatch)
        else:
            options = Options(autocast_adapter_dtype, low_cpu_mem_usage)
            self._take_in(stored, adapter_name, options, ignore_base_mismatch)
            self.base_model.set_requires_grad(adapter_name, is_trainable)
        return nn.modules.module._IncompatibleKeys([], [])

    def _take_in(self, stored: StoredAdapter, name: str, options: Options, ignore_base: bool) -> None:
        if not ignore_base:
            check_fits_base(self.get_base_model(), stored)
        options = replace(
            options, from_file=True, file_has_starts=stored.with_start, quantized=frozenset(stored.quantized)
        )
        take_back = self.base_model.apply_plan(self.base_model.plan_adapter(stored.config, name, options))
        try:
            self._fill(stored, name, ignore_base=True)
            note_history(self.get_base_model(), name, stored)
        except BaseException:
            take_back()
            raise

    def _fill(self, stored: StoredAdapter, name: str, ignore_base: bool = False) -> None:
        model, config = self.get_base_model(), self.peft_config[name]
        require_unmerged(model, name, "loading other values into it")
        if not ignore_base:
            check_fits_base(model, stored)
        misfit(model, name, config, stored.tensors, with_start=stored.with_start).raise_if_any(stored.path, name)
        materialize(model, name)
        load_tensors(model, name, config, stored.tensors, with_start=stored.with_start)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        *,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write adapters in PEFT's format: "default" into the folder itself, others into sub-folders of their name.

        Args:
            selected_adapters: which ones; default all.
            save_embedding_layers: True adds the base weights of embedding and head (for a resized vocabulary), False
                does not; "auto" adds them, as PEFT does, if "embed_tokens" or "lm_head" is a target.
            is_main_process: False writes nothing, for all ranks but one.
            path_initial_model_for_weight_conversion: not needed here and not read: what PEFT makes of it, plain LoRA on
                the pristine base, is what a file of lorafa holds anyway, but for DoRA.
            state_dict: take the tensors from this gathered state dict of the PeftModel.

        Raises:
            NotAvailableError: ``safe_serialization=False``; pickles are not written.
            AdapterError: an unknown adapter name.
            CheckpointError: ``state_dict`` lacks a tensor, or a file could not be written; what was there before is as
                it was.
        """
        if not safe_serialization:
            raise NotAvailableError(
                "lorafa writes safetensors only; a pickle can run code when loaded. Drop safe_serialization=False."
            )
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        require_adapters(self.get_base_model(), names)
        if not is_main_process:
            return
        model = self.get_base_model()
        for name in names:
            folder = Path(save_directory) / ("" if name == "default" else name)
            config = self.peft_config[name]
            embeddings = keeps_embeddings(config, model, save_embedding_layers)
            save_adapter(model, name, config, folder, state_dict=state_dict, embeddings=embeddings)
        write_card(save_directory, self.peft_config[names[0]])

    # ---- adapters

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter name -> the config it was made from."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        return self.base_model.active_adapter

    @property
    def peft_type(self) -> PeftType:
        return PeftType.LORA

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether some adapter counts now."""
        return any(layer.active_adapters and not layer.disable_adapters for _, layer in self.base_model.lora_layers())

    @property
    def active_peft_config(self) -> LoraConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {name for config in self.peft_config.values() for name in config.modules_to_save or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> Any:
        return getattr(self.get_base_model(), "dtype", None)

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
        self._add(_with_base_name(peft_config, self.get_base_model()), adapter_name, options, stats)

    def _add(self, config: LoraConfig, name: str, options: Options, stats: Stats | None) -> None:
        model = self.get_base_model()
        self.base_model.inject_adapter(config, name, options, given(model, config, stats))
        if stats is None and config.start.initializer.needs:  # it has taken what a preprocess function left
            forget_kept(model)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make exactly this adapter count, and train unless ``inference_mode``.

        ``base_model.set_adapter([...])`` lets several count together.
        """
        if not isinstance(adapter_name, str):
            raise AdapterError(
                f"PeftModel.set_adapter takes one name, found {adapter_name!r}. To let several adapters count together "
                "call base_model.set_adapter([...])."
            )
        self.base_model.set_adapter(adapter_name, inference_mode)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base model alone for the length of a with-block, also while adapters are merged."""
        with disabled(self.get_base_model()):
            yield

    def get_base_model(self) -> nn.Module:
        """The user's model, its adapted layers wrapped."""
        return self.base_model.model

    # ---- reports

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters, each counted once."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        trainable, everything = self.get_nb_trainable_parameters()
        share = 100 * trainable / everything if everything else 0.0
        print(f"trainable params: {trainable:,d} || all params: {everything:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[LayerStatus]:
        return get_layer_status(self)

    def get_model_status(self) -> ModelStatus:
        return get_model_status(self)

    # ---- running

    @ForwardOfTheWrapped
    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Arguments and result are the wrapped model's; ``labels`` is spelled out for trainers that look for it."""
        _refuse_mixed_batch(kwargs)
        if labels is not None:
            kwargs["labels"] = labels
        return self.base_model(*args, **kwargs)  # and not past it: hooks may be on the LoraModel

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        _refuse_mixed_batch(kwargs)
        return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Turn activation checkpointing on, of either kind: the embedding's output is made to require a gradient."""
        model: Any = self.get_base_model()
        model.gradient_checkpointing_enable(*args, **kwargs)
        let_inputs_require_grad(model)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The newer name of :meth:`gradient_checkpointing_enable` in transformers, which its Trainer calls."""
        model: Any = self.get_base_model()
        model.activation_checkpointing_enable(*args, **kwargs)
        let_inputs_require_grad(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def _refuse_mixed_batch(arguments: Mapping[str, Any]) -> None:
    if "adapter_names" in arguments:
        raise NotAvailableError(
            "adapter_names: batches that mix adapters are not available yet in lorafa. Run one batch an adapter, with "
            "set_adapter before it."
        )


def _check_can_wrap(model: nn.Module, method: str) -> None:
    if isinstance(model, PeftModel):
        raise AdapterError(f"The model is a PeftModel already. Call its {method}() to put another adapter on it.")
    require_nothing_merged(model)


def _with_base_name(config: LoraConfig, model: nn.Module) -> LoraConfig:
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    return replace(config, base_model_name_or_path=name) if name else replace(config)


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
        peft_config: what to adapt and how; it is copied, never changed.
        autocast_adapter_dtype: keep adapters in float32 where the base is float16 or bfloat16.
        revision: revision of the base model, for the saved config.
        low_cpu_mem_usage: make the factors on the meta device, to be filled from a file.
        stats: what a data-aware start reads, from :func:`lorafa.collect_statistics`: full name of a target -> name of
            a tensor -> its value.

    Raises:
        TargetError: a pattern matches nothing, or something that cannot carry an adapter.
        CalibrationError: the start reads statistics that are not given, or not of this model.
        ConfigError: a setting is wrong, or does not go with a layer; or ``stats`` for a start that reads none.
        NotAvailableError: the config asks for a feature this version does not have.
        AdapterError: the adapter's name is unusable, or the model is a PeftModel already.

    After any of them the model is bit-identical to what it was.
    """
    if mixed:
        raise NotAvailableError(
            "mixed=True: models with adapters of several kinds are not available in lorafa. Drop mixed=True."
        )
    _check_can_wrap(model, "add_adapter")
    wrapped = PeftModel(model)
    config = _with_base_name(peft_config, model)
    if revision is not None:
        config.revision = revision
    wrapped._add(config, adapter_name, Options(autocast_adapter_dtype, low_cpu_mem_usage), stats)
    wrapped.base_model.set_adapter(adapter_name, inference_mode=config.inference_mode)
    if is_checkpointed(model):
        let_inputs_require_grad(model)
    return wrapped
