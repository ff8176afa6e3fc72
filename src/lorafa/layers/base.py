"""LoraLayer: a frozen base layer plus named adapters whose output changes are added up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lorafa.adapter import Adapter, Start, scaling
from lorafa.backends import backend_of
from lorafa.backends.base import Backend
from lorafa.backends.offload import device_of, in_memory, value_of, weight_of
from lorafa.errors import AdapterError, BackendError, ConfigError, warn
from lorafa.layers import own_modules
from lorafa.layers.parts import AdapterParts, Stored, Weight, held_by, linear_holder
from lorafa.layers.weights import updated_bias, with_changes

if TYPE_CHECKING:
    from typing_extensions import Self

    from lorafa.config import LoraConfig


class LoraLayer(nn.Module):
    """The storage and names are PEFT's (``lora_A[name].weight``, ``scaling[name]``, ``merged_adapters`` ...).

    What differs between kinds of layer is here as hooks: how factors are stored, how s B A x is computed, how a vector
    over output features broadcasts.
    """

    kind: ClassVar[str]
    factor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    """What A and B are called in a file."""
    wrapped_path: ClassVar[str] = "base_layer"
    """Where the module sits whose place the layer takes."""
    takes_dropout: ClassVar[bool] = True
    """Whether the adapter has an input of its own that ``lora_dropout`` can act on."""
    takes_bias: ClassVar[bool] = True
    """Whether B can have a bias (``lora_bias``)."""
    inner_layers: ClassVar[tuple[str, ...]] = ()
    """Children of the base layer that get an adapter of their own whenever it gets one."""
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    other_param_names: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "scaling", "lora_dropout")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.training = base_layer.training
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.times: dict[str, int] = {}
        self.use_rslora: dict[str, bool] = {}
        self.use_dora: dict[str, bool] = {}
        self.lora_bias: dict[str, bool] = {}
        self.trains: dict[str, str] = {}
        self.fallbacks: dict[str, str] = {}
        self.origin: dict[str, Any] | None = None  # describes the dense weight that a start has quantized
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self.lora_start = nn.ModuleDict()
        self.adapters: dict[str, Adapter] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        self._pristine: tuple[nn.Module, ...] = ()  # the base layer while a merged one stands in its place
        self.out_features, self.in_features = self.backend.shape(self.get_base_layer())

    # ---- what a kind of layer must say

    @classmethod
    def check(cls, name: str, base: nn.Module, rank: int, config: LoraConfig) -> None:
        """Refuse, or warn of, what does not go with this kind of layer; ``name`` is the layer's, for the message.

        Raises:
            ConfigError: a rank or setting cannot be carried out on such a layer.
            BackendError: nothing can be, on this very layer.
        """
        if config.lora_bias and not cls.takes_bias:
            raise ConfigError(
                f"{name}: lora_bias is not defined on {cls.kind} layers. Exclude it, or set lora_bias=False."
            )
        if config.lora_dropout and not cls.takes_dropout:
            warn(f"{name}: lora_dropout does not act on {cls.kind} layers: the update has no input to drop there.")

    @classmethod
    def groups(cls, base: nn.Module) -> int:
        """How many groups of outputs see only their share of the ranks: B has r / groups columns."""
        return 1

    def hold_factors(self, name: str, A: Tensor, B: Tensor, bias: Tensor | None) -> None:
        """Make parameters of factors that are in the stored layout."""
        self.lora_A[name] = linear_holder(A)
        self.lora_B[name] = linear_holder(B, bias)

    def stored_A(self, matrix: Tensor) -> Tensor:
        """A (r, in) in the layout PEFT stores it in; :meth:`matrix_A` undoes it."""
        return matrix

    def stored_B(self, matrix: Tensor) -> Tensor:
        """B (out, r) in the layout PEFT stores it in; :meth:`matrix_B` undoes it."""
        return matrix

    def matrix_A(self, stored: Tensor) -> Tensor:
        return stored

    def matrix_B(self, stored: Tensor) -> Tensor:
        return stored

    def factor_A(self, name: str) -> Tensor:
        """A as (r, in)."""
        return self.matrix_A(weight_of(self.lora_A._modules[name]))  # type: ignore[arg-type]

    def factor_B(self, name: str) -> Tensor:
        """B as (out, r)."""
        return self.matrix_B(weight_of(self.lora_B._modules[name]))  # type: ignore[arg-type]

    def factor_bias(self, name: str) -> Tensor | None:
        return in_memory(self.lora_B[name]).bias if self.lora_bias[name] else None  # type: ignore[no-any-return]

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
        """s B A drop(x) for the layer's input x, in the layout of its output.

        Raises:
            BackendError: the layer adds its update to the weight, so there is no product with an input.
        """
        raise BackendError(
            f"{type(self).__name__} adds its update to the weight for the length of a forward pass and has no low-rank "
            "product with an input. Use a variant that is defined on such layers, or exclude the layer."
        )

    def per_output(self, vector: Tensor) -> Tensor:
        """A vector over output features, (out,), shaped to broadcast against the layer's output."""
        return vector

    def dense_weight(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight (out, in) and bias (out,) if base(x) is just linear(x, weight, bias) and may be computed elsewhere."""
        return None

    as_made, fits = own_modules.as_made, own_modules.fits
    by_modules, require_readable = own_modules.by_modules, own_modules.require_readable

    # ---- the base layer

    @property
    def backend(self) -> Backend:
        backend = backend_of(self.get_base_layer())
        if backend is None:
            raise BackendError(
                f"No back end knows {type(self.get_base_layer()).__name__}. Add its line to lorafa.backends.BACKENDS."
            )
        return backend

    def get_base_layer(self) -> nn.Module:
        base = self.base_layer
        while isinstance(base, LoraLayer):
            base = base.base_layer
        return base

    @property
    def pristine(self) -> nn.Module:
        """The base layer with the weight nothing was merged into."""
        return self._pristine[0] if self._pristine else self.get_base_layer()

    def running_base(self) -> nn.Module:
        """The base layer that runs when no adapter counts: while adapters are disabled the pristine one."""
        return self._pristine[0] if self._disable_adapters and self._pristine else self.base_layer

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(x, *args, **kwargs)

    def base_weight(self) -> Tensor:
        """The pristine weight, (out, in), dequantized where it is quantized."""
        return self.backend.weight(in_memory(self.pristine))

    def base_bias(self) -> Tensor | None:
        return value_of(self.get_base_layer(), self.backend.bias(self.get_base_layer()))

    @property
    def weight(self) -> Tensor:
        return self.running_base().weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.running_base(), "bias", None)

    # What happens to the layer happens to the pristine base too, which is no part of the module tree while merged.

    def train(self, mode: bool = True) -> Self:
        for kept in self._pristine:
            kept.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for kept in self._pristine:
            kept._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    # ---- adapters

    def attach(self, name: str, parts: AdapterParts) -> None:
        """Take in an adapter that has been built; the names in ``parts`` are not checked here."""
        device = parts.A.device if parts.A.is_meta else device_of(self.get_base_layer())

        def placed(tensor: Tensor) -> Tensor:
            # Strides decide over kernels and so over bits: those of a reloaded adapter, also along sizes of one.
            tensor = tensor.to(device=device, dtype=parts.dtype).contiguous()
            return tensor.view(-1).view(tensor.shape)

        self.r[name], self.lora_alpha[name], self.times[name] = parts.rank, parts.alpha, parts.times
        self.scaling[name] = parts.times * parts.scaling
        self.use_rslora[name], self.use_dora[name] = parts.use_rslora, parts.variant.name == "dora"
        self.lora_bias[name], self.trains[name] = parts.bias is not None, parts.trains
        self.lora_dropout[name] = nn.Dropout(parts.dropout) if parts.dropout else nn.Identity()
        bias = None if parts.bias is None else placed(parts.bias)
        self.hold_factors(name, placed(self.stored_A(parts.A)), placed(self.stored_B(parts.B)), bias)
        for kind, value in parts.extras.items():
            self._holder(parts.variant.extras[kind])[name] = Weight(self.store_extra(placed(value)))
        if parts.start is not None:
            self.lora_start[name] = Start(*(placed(factor) for factor in parts.start))
        if parts.fallback is not None:
            self.fallbacks[name] = parts.fallback
        self.adapters[name] = Adapter(self, name, parts.variant)
        for holder in self.holders():  # not self.train(): what is inside the base keeps its modes
            holder.training = self.training
            if isinstance(holder, nn.ModuleDict) and name in holder:
                holder[name].train(self.training)

    def holders(self) -> Iterator[nn.ModuleDict | nn.ParameterDict]:
        """What has modules or parameters by the name of their adapter."""
        return (child for name, child in self._modules.items() if name != "base_layer")  # type: ignore[misc]

    def _holder(self, kind: str) -> nn.ModuleDict:
        """The holder called ``kind``, made when the first variant needs it."""
        return self._modules.setdefault(kind, nn.ModuleDict())  # type: ignore[return-value]

    def store_extra(self, value: Tensor) -> Tensor:
        """A vector over output features in the shape PEFT stores it in."""
        return value

    def detach_adapter(self, name: str) -> None:
        """Forget an adapter and all its parameters."""
        if name in self.merged_adapters:
            raise AdapterError(f"Adapter {name!r} is merged. Call unmerge_adapter() before deleting it.")
        holders: tuple[Any, ...] = (
            self.r, self.lora_alpha, self.scaling, self.times, self.use_rslora, self.use_dora, self.lora_bias,
            self.trains, self.fallbacks, self.adapters, *self.holders(),
        )  # fmt: skip
        for holder in holders:
            if name in holder:
                del holder[name]
        self._active_adapter = [active for active in self._active_adapter if active != name]

    def stored(self, name: str) -> Iterator[Stored]:
        """What a file holds of an adapter; nothing if it is not on this layer, or belongs to another one."""
        for key in self.factor_names:
            holder = key.partition(".")[0]
            if name in getattr(self, holder):
                yield from held_by(holder, name, getattr(self, holder)[name])
        for holder in self.adapters[name].variant.extras.values() if name in self.adapters else ():
            yield Stored(holder, f"{holder}.{name}.weight", getattr(self, holder)[name].weight)

    def stored_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of an adapter by their names in a file."""
        return {e.key: e.tensor for e in self.stored(name)}  # type: ignore[misc]

    def plain(self, names: Sequence[str]) -> nn.Module:
        """The module without the wrapper, merged as it is."""
        return self.base_layer

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active_adapter)

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    def set_adapter(self, names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters count, and train (unless ``inference_mode``)."""
        self._active_adapter = [names] if isinstance(names, str) else list(names)
        for name in self.adapters:
            self.set_requires_grad(name, name in self._active_adapter and not inference_mode)

    def set_requires_grad(self, name: str, requires_grad: bool = True) -> None:
        factors = dict(zip(self.factor_names, "AB", strict=True))
        for key, parameter in self.stored_parameters(name).items():
            parameter.requires_grad_(requires_grad and factors.get(key, "") in self.trains[name])

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled

    def counting(self) -> list[Adapter]:
        """The adapters that change the output now."""
        if self._disable_adapters or self.merged_adapters:
            return []
        return [self.adapters[name] for name in self._active_adapter if name in self.adapters]

    # ---- scale

    def initial_scale(self, name: str) -> float:
        return self.times[name] * scaling(self.r[name], self.lora_alpha[name], self.use_rslora[name])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling to ``scale`` times alpha / r (or alpha / sqrt(r))."""
        if adapter in self.scaling:
            self._rescale(adapter, scale * self.initial_scale(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self._active_adapter:
            if name in self.scaling:
                self._rescale(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by ``scale``, or set it back to its start."""
        for name in self._active_adapter:
            if name in self.scaling:
                self._rescale(name, self.initial_scale(name) if scale is None else self.scaling[name] / scale)

    def _rescale(self, name: str, value: float) -> None:
        if self.without_start:  # s B0 A0 was taken out for the scaling it had
            self.unmerge()
        self.scaling[name] = value

    # ---- weights

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight, in the layout and dtype of the base layer's own weight."""
        return self.backend.to_layout(in_memory(self.pristine), self.adapters[adapter].delta_weight(self.base_weight()))

    @torch.no_grad()
    def merged_base(self, names: Sequence[str]) -> nn.Module:
        """A new base layer with the updates of ``names`` in its weight: summed in float32, rounded once."""
        adapters, weight = [self.adapters[name] for name in names], self.base_weight()
        changes = (adapter.delta_weight(weight) for adapter in adapters)
        return with_changes(self, changes, names, updated_bias(self, adapters))

    def put_merged(self, base: nn.Module, names: Sequence[str]) -> None:
        """Let ``base`` stand in for the base layer; the pristine one is kept for :meth:`unmerge`."""
        self._pristine = self._pristine or (self.base_layer,)
        self.base_layer = base
        self.merged_adapters = list(names)

    def mergeable(self, adapter_names: Sequence[str] | None = None) -> list[str]:
        """What a merge would leave merged: what is, then the named (default: the active) adapters of this layer."""
        wanted = self._active_adapter if adapter_names is None else list(adapter_names)
        return list(dict.fromkeys([*self.merged_adapters, *(name for name in wanted if name in self.adapters)]))

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Put the updates into the base weight until :meth:`unmerge`; always checked for inf and nan."""
        names = self.mergeable(adapter_names)
        if names != self.merged_adapters:
            self.put_merged(self.merged_base(names), names)

    def unmerge(self) -> None:
        """Bring the pristine base layer back, bit for bit."""
        if self._pristine:
            self.base_layer, self._pristine = self._pristine[0], ()
            self.merged_adapters = []

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def without_start(self) -> bool:
        """Whether the start of the active adapter is taken out of the base that runs (surgery/mutate.py)."""
        return bool(self._pristine) and not self.merged_adapters

    # ---- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        adapters = self.counting()
        if not adapters:
            return self.running_base()(x, *args, **kwargs)
        if len(adapters) == 1 and not args and not kwargs and adapters[0].as_made:
            fused = adapters[0].variant.fused(adapters[0], x)
            if fused is not None:
                return fused
        y = self.base_layer(x, *args, **kwargs)
        out, x = y, x.to(y.device)  # where a hook of the base layer may have brought it
        for adapter in adapters:
            out = out + adapter.delta_output(x, y).to(y.dtype)
        return out

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: r={self.r[name]}, scaling={self.scaling[name]:g}" for name in self.adapters)
