"""What is asked of an adapted model whatever it is: its adapters, which of them count, merging, reports."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from lorafa.config import LoraConfig
from lorafa.errors import AdapterError
from lorafa.settings.methods import PeftType
from lorafa.surgery.activate import disabled
from lorafa.surgery.build import Options
from lorafa.surgery.combination import Combination
from lorafa.surgery.forward import let_inputs_require_grad
from lorafa.surgery.lora_model import LoraModel
from lorafa.surgery.resolve import Resolved, resolve
from lorafa.surgery.stats import Stats
from lorafa.surgery.status import LayerStatus, ModelStatus, count_parameters, get_layer_status, get_model_status
from lorafa.surgery.verify import MergeCheck


class AdaptedModel(nn.Module):
    """Passes on to its LoraModel what scripts ask of a PeftModel; making, files and running are PeftModel's own."""

    base_model: LoraModel

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

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let the output of the model's embedding require a gradient, which reentrant checkpointing needs."""
        let_inputs_require_grad(model)
        return model

    @abstractmethod
    def _start(self, resolved: Resolved, name: str, options: Options, stats: Stats | None = None) -> None:
        """Put an adapter on and let it count alone."""

    def put_anew(self, config: LoraConfig, name: str, options: Options, stats: Stats | None = None) -> None:
        """Put an adapter on, in the place of one of its name if there is one, and let it count alone.

        Raises:
            As :func:`lorafa.get_peft_model`; what it says of config and layers, before anything is changed.
        """
        if name in self.peft_config:
            trial = replace(options, low_cpu_mem_usage=True)  # no start is computed
            self.base_model.plan_adapter(resolve(self.base_model.model, config), f"{name}_anew", trial)
            self.base_model.delete_adapter(name)
        self._start(resolve(self.base_model.model, config), name, options, stats)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether some adapter counts now."""
        return any(layer.active_adapters and not layer.disable_adapters for _, layer in self.base_model.lora_layers())

    @property
    def routes_tokens(self) -> bool:
        """Whether a token has only parts of an adapter that counts, so that rounding may decide which."""
        found = (adapter for _, layer in self.base_model.lora_layers() for adapter in layer.counting())
        return any(not adapter.variant.one_product for adapter in found)

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

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the only active one, another (if any) becomes active.

        Raises:
            AdapterError: an unknown name, or an adapter is merged; nothing was changed.
        """
        self.base_model.delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them, whether they count or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        *,
        seed: int | None = None,
    ) -> Combination:
        """Combine adapters to a new one, plain LoRA on every layer one of them is on, with the scaling 1.

        It is frozen and does not count until :meth:`set_adapter`. What counts and what is merged stays so, and no
        weight of the base changes. One adapter of weight 1 is copied with the scaling it has, whatever the type, unless
        a rank, a clamp or a density says otherwise. Biases of B (``lora_bias``) are summed by weight and scaling.

        Args:
            adapters: names; their ranks, scalings, formulas and layers may differ.
            weights: one number an adapter, also negative.
            adapter_name: of the new adapter.
            combination_type: "cat": the exact weighted sum, of the sum of all ranks. "svd": the nearest update to it of
                ``svd_rank``. "linear": A with A and B with B, which adds products of the A of one with the B of
                another. "magnitude_prune", "ties", "dare_linear", "dare_ties": A with A and B with B, pruned; with
                "_svd" at their end the updates themselves, as matrices.
            svd_rank: rank of the types that end in "svd"; None: the largest rank combined on a layer, which is twice
                that of its config where a start is taken off.
            svd_clamp: a quantile in (0.5, 1] to which the entries of the factors are clamped.
            svd_full_matrices: not read; the result is the same.
            svd_driver: method of cuSOLVER, on CUDA.
            density: the share of entries that pruning keeps, in (0, 1].
            majority_sign_method: "total" or "frequency": how TIES elects signs.
            seed: what DARE draws from; None: ``torch.initial_seed()``.

        Returns:
            What each layer was to hold, and how much of that is lost; it is also logged. PEFT returns nothing.

        Raises:
            AdapterError: an unknown adapter, a name that is taken, or another number of weights; adapters both train
                the same module in full, or base biases; values are missing or not finite.
            ConfigError: an unknown type; a weight, rank, density or another value that is not allowed; the type needs
                equal ranks and they differ.
            BackendError: an update changes with the input (aLoRA, Arrow, GOAT), or is no product and the type needs one
                (DoRA). The model is as it was after any of them.
        """
        return self.base_model.add_weighted_adapter(
            adapters, weights, adapter_name, combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver,
            density, majority_sign_method, seed=seed,
        )  # fmt: skip

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the base model alone for the length of a with-block, also while adapters are merged."""
        with disabled(self.get_base_model()):
            yield

    def enable_adapter_layers(self) -> None:
        """Let the active adapters count again."""
        self.base_model.enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """Run the base model alone until :meth:`enable_adapter_layers`."""
        self.base_model.disable_adapter_layers()

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        verify: bool | Mapping[str, Any] = False,
    ) -> MergeCheck | None:
        """Put updates (default: those of the active adapters) into the base weights until :meth:`unmerge_adapter`.

        Args:
            safe_merge: PEFT's; what is merged is always checked for inf and nan.
            verify: compare outputs before and after (:func:`lorafa.check_merge`), on made token ids (True) or on these
                arguments of the model's forward.

        Returns:
            How far the outputs are apart, with ``verify``; None without.

        Raises:
            AdapterError, BackendError: as :func:`lorafa.surgery.merge.merge_adapter`, or the outputs are further apart
                than rounding explains; nothing was merged.
        """
        return self.base_model.merge_adapter(adapter_names, safe_merge, verify=verify)

    def unmerge_adapter(self) -> None:
        """Bring the pristine base weights back, bit for bit."""
        self.base_model.unmerge_adapter()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        verify: bool | Mapping[str, Any] = False,
    ) -> nn.Module:
        """The user's model with the updates folded in and every wrapper gone; always as safe as ``safe_merge`` asks.

        Args:
            verify: as for :meth:`merge_adapter`; :func:`lorafa.check_merge` gives the numbers.

        Raises:
            AdapterError, BackendError: as :meth:`merge_adapter`; the model is as it was.
        """
        return self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names, verify=verify)

    def unload(self) -> nn.Module:
        """The user's model as it was before any adapter, bit for bit; layers LoftQ has quantized stay so."""
        return self.base_model.unload()

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
