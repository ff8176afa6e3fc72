"""LoraLayer: a frozen base layer plus named adapters whose output changes are added up."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lorafa.adapter import Adapter, Start
from lorafa.backends import backend_of
from lorafa.backends.base import Backend
from lorafa.backends.oddities import described
from lorafa.backends.offload import device_of, in_memory, value_of, weight_of
from lorafa.context import Rows
from lorafa.errors import AdapterError, BackendError, ConfigError, warn
from lorafa.layers import merging, mixed, own_modules
from lorafa.layers.asked import AskedOfLayers
from lorafa.layers.by_name import Table, number
from lorafa.layers.host import Host
from lorafa.layers.parts import AdapterParts, Extras, Stored, freeze_all_but, held_by, linear_holder, set_mode
from lorafa.numerics.fused import Codes, Keep

if TYPE_CHECKING:
    from typing_extensions import Self


_NOT_THE_BASE = ("_", "lora_")
_MISSING = object()


class LoraLayer(Host, AskedOfLayers):
    """The storage and names are PEFT's (``lora_A[name].weight``, ``scaling[name]``, ``merged_adapters`` ...).

    What differs between kinds of layer is here as hooks: how factors are stored, how s B A x is computed, how a vector
    over output features broadcasts.
    """

    kind: ClassVar[str]
    factor_names: ClassVar[tuple[str, str]] = ("lora_A.weight", "lora_B.weight")
    """What A and B are called in a file."""
    wrapped_path: ClassVar[str] = "base_layer"
    takes_dropout: ClassVar[bool] = True
    """Whether the adapter has an input of its own that ``lora_dropout`` can act on."""
    takes_bias: ClassVar[bool] = True
    """Whether B can have a bias (``lora_bias``)."""
    is_linear: ClassVar[bool] = False
    """Whether the base computes x W^T + b for x (..., in), so that statistics of inputs and gradients are defined."""
    is_table: ClassVar[bool] = False
    """Whether the base looks up rows: a row of A is met only when its token is."""
    changes_weight: ClassVar[bool] = False
    """Whether the update goes into the weight for the length of a call, in place of a product with an input."""
    can_be_tied: ClassVar[bool] = False
    """Whether it can count the adapter of a layer with the same weight, or its transpose, as its own."""
    parameter_name: str | None = None
    """The parameter of the module that is adapted, where it ``nests``; None: the module's weight is."""
    weight_is_read: bool = False
    """Whether the module around it may multiply by ``weight`` itself instead of calling the layer."""
    inner_layers: ClassVar[tuple[str, ...]] = ()
    """Children of the base layer that get an adapter of their own whenever it gets one."""
    adapter_layer_names: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
    other_param_names: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "scaling", "lora_dropout")

    lora_dropout: nn.ModuleDict
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict
    lora_magnitude_vector: nn.ModuleDict
    lora_start: nn.ModuleDict

    r: Table[int] = number("rank")
    lora_alpha: Table[float] = number("alpha")
    scaling: Table[float | Tensor] = number("scaling")
    use_rslora: Table[bool] = number("use_rslora")
    use_dora: Table[bool] = Table(lambda adapter: any(v.switch == "use_dora" for v in adapter.variant.chain()))
    lora_bias: Table[bool] = Table(lambda adapter: adapter.has_bias)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.base_layer = base_layer
        self.origin: dict[str, Any] | None = None  # describes the dense weight that a start has quantized
        for holder in ("lora_dropout", "lora_A", "lora_B"):  # each attribute of a module that is set costs a search
            self._modules[holder] = nn.ModuleDict()
        for holder in ("lora_embedding_A", "lora_embedding_B"):
            self._modules[holder] = nn.ParameterDict()
        for holder in ("lora_magnitude_vector", "lora_start"):
            self._modules[holder] = nn.ModuleDict()
        self.adapters: dict[str, Adapter] = {}
        self._followers: list[str] = []  # adapters of which something follows from others
        self.merged_adapters: list[str] = []
        self._pristine: tuple[nn.Module, ...] = ()  # the base layer while a merged one stands in its place
        self._found: tuple[nn.Module, type, Backend] | None = None  # the back end of a layer with such a weight
        self.out_features, self.in_features = self.backend.shape(self.get_base_layer())

    # ---- what a kind of layer must say

    @classmethod
    def around(cls, base_layer: nn.Module, parameter_name: str | None) -> Self:
        """The layer on a module, or where it ``nests`` on one parameter of it."""
        return cls(base_layer)

    @classmethod
    def check(cls, name: str, base: nn.Module, rank: int, *, bias: bool, dropout: float) -> None:
        """Refuse, or warn of, what does not go with this kind of layer.

        Args:
            name: the layer's, for the message.
            bias: whether B is to have a bias (``lora_bias``).
            dropout: ``lora_dropout``.

        Raises:
            ConfigError: a rank or setting cannot be carried out on such a layer.
            BackendError: nothing can be, on this very layer.
        """
        if bias and not cls.takes_bias:
            raise ConfigError(
                f"{name}: lora_bias is not defined on {cls.kind} layers. Exclude it, or set lora_bias=False."
            )
        if dropout and not cls.takes_dropout:
            warn(f"{name}: lora_dropout does not act on {cls.kind} layers: the update has no input to drop there.")

    @classmethod
    def rank_groups(cls, base: nn.Module) -> int:
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
        return in_memory(self.lora_B[name]).bias if self.adapters[name].has_bias else None  # type: ignore[no-any-return]

    def extra(self, holder: str, name: str, key: str = "weight") -> Tensor:
        """A tensor that a variant has added, by its PEFT name."""
        return weight_of(self.holder_of(holder, name), key)

    def holder_of(self, holder: str, name: str) -> nn.Module:
        """The module that holds what a variant has added."""
        return self._modules[holder]._modules[name]  # type: ignore[union-attr, return-value]

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, scaling: float | Tensor, dropout: float = 0.0, keep: Keep | None = None
    ) -> Tensor:
        """s B A drop(x) for the layer's input x, in the layout of its output.

        Args:
            keep: what is kept of x for the gradient of A, on linear layers; no formula on others has one.

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

    def dense_weight(self, x: Tensor) -> tuple[Tensor | Codes, Tensor | None] | None:
        """Weight (out, in), or the codes of one, and bias (out,), if base(x) is just linear(x, weight, bias) and may be
        computed elsewhere."""
        return None

    as_made, fits = own_modules.as_made, own_modules.fits
    by_modules, require_readable = own_modules.by_modules, own_modules.require_readable
    require_uncalled = own_modules.require_uncalled

    # ---- the base layer

    @property
    def backend(self) -> Backend:
        """How the base layer stores its weight, looked up anew where another layer or weight is there."""
        base = self.get_base_layer()
        kind = type(base._parameters.get("weight"))
        if self._found is not None and self._found[0] is base and self._found[1] is kind:
            return self._found[2]
        backend = backend_of(base)
        if backend is None:
            raise BackendError(
                f"No back end knows {type(base).__name__}, which stands where the base layer was. Under FSDP1 wrap "
                "whole blocks (auto_wrap_policy), no base layers, or use FSDP2 (fully_shard)."
            )
        self._found = base, kind, backend
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
        return self.run_base(self.base_layer, x, *args, **kwargs)

    def run_base(self, base: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What ``base``, the base layer that runs, gives for x."""
        return base(x, *args, **kwargs)

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
        self.training = mode
        for child in self._modules.values():
            set_mode(child, mode)  # type: ignore[arg-type]
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for kept in self._pristine:
            kept._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for adapter in self.adapters.values():
            adapter.move_held()
        return self

    # ---- adapters

    def attach(self, name: str, parts: AdapterParts) -> None:
        """Take in an adapter that has been built; the names in ``parts`` are not checked here."""
        device = parts.A.device if parts.A.is_meta else device_of(self.get_base_layer())

        def placed(tensor: Tensor) -> Tensor:
            # Strides decide over kernels and so over bits: those of a reloaded adapter, also along sizes of one.
            tensor = tensor.to(device=device, dtype=parts.dtype).contiguous()
            return tensor.view(-1).view(tensor.shape)

        variant, extras = parts.variant, parts.variant.extras
        self.lora_dropout[name] = nn.Dropout(parts.dropout) if parts.dropout else nn.Identity()
        bias = None if parts.bias is None else placed(parts.bias)
        self.hold_factors(name, placed(self.stored_A(parts.A)), placed(self.stored_B(parts.B)), bias)
        for kind, value in parts.extras.items():
            extra = extras[kind]
            beside = self._holder(extra.holder)
            held = cast(Extras, beside[name]) if name in beside else Extras()
            held.hold(extra.key, self.store_extra(placed(value)), trained=extra.trained, saved=extra.saved)
            beside[name] = held
        if parts.start is not None:
            self.lora_start[name] = Start(*(placed(factor) for factor in parts.start))
        self.adapters[name] = Adapter(
            self, name, variant, parts.rank, parts.alpha, parts.use_rslora, parts.times, parts.trains, parts.fallback,
            bias is not None,
        )  # fmt: skip
        if variant.follows:
            self._followers.append(name)
        for holder in self.holders():  # not self.train(): what is inside the base keeps its modes
            if holder.training is not self.training:
                holder.training = self.training
            if name in holder._modules:
                set_mode(holder._modules[name], self.training)  # type: ignore[arg-type]
        self.adapters_changed()

    def adapters_changed(self) -> None:
        """Let variants compute again what follows from the adapters of the layer."""
        for name in self._followers:
            self.adapters[name].variant.changed(self, name)

    def holders(self) -> Iterator[nn.ModuleDict | nn.ParameterDict]:
        """What has modules or parameters by the name of their adapter."""
        return (child for name, child in self._modules.items() if name != "base_layer")  # type: ignore[misc]

    def _holder(self, kind: str) -> nn.ModuleDict:
        """The holder called ``kind``, made when the first variant needs it."""
        return self._modules.setdefault(kind, nn.ModuleDict())  # type: ignore[return-value]

    def store_extra(self, value: Tensor) -> Tensor:
        """A vector over output features in the shape PEFT stores it in."""
        return value

    @property
    def fallbacks(self) -> dict[str, str]:
        """Adapter -> why it started as by default instead of as asked; a copy."""
        return {name: a.fallback for name, a in self.adapters.items() if a.fallback is not None}

    def held(self) -> Collection[str]:
        return self.adapters

    def forget(self, name: str) -> None:
        if name in self.merged_adapters:
            raise AdapterError(f"Adapter {name!r} is merged. Call unmerge_adapter() before deleting it.")
        for holder in (self.adapters, *self.holders()):
            if name in holder:
                del holder[name]
        if name in self._followers:
            self._followers.remove(name)
        self.adapters_changed()

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's name of :meth:`detach_adapter`; ``PeftModel.delete_adapter`` keeps all layers and configs in step."""
        self.detach_adapter(adapter_name)

    def stored(self, name: str) -> Iterator[Stored]:
        """What a file holds of an adapter; nothing if it is not on this layer, or belongs to another one."""
        for key in self.factor_names:
            kind = key.partition(".")[0]
            holder: Any = self._modules[kind]
            if name in holder:
                yield from held_by(kind, name, holder[name])
        for extra in self.adapters[name].variant.extras.values() if name in self.adapters else ():
            if extra.saved:
                tensor = self.extra(extra.holder, name, extra.key)
                yield Stored(extra.in_files, f"{extra.holder}.{name}.{extra.key}", tensor)

    def is_empty(self, name: str) -> bool:
        return name in self.adapters and self.adapters[name].is_empty

    def has_update(self, name: str) -> bool:
        """Whether an adapter is on this layer, and was not left without anything here when it was exchanged."""
        return name in self.adapters and not self.adapters[name].is_empty

    def tensors_of(self, name: str) -> list[Tensor]:
        """Its parameters; A and B where it is tied and they are another layer's."""
        return super().tensors_of(name) or [self.adapters[name].A, self.adapters[name].B]

    def unwrapped(self, names: Sequence[str]) -> nn.Module:
        """The base layer, merged as it is."""
        return self.base_layer

    def merged_parameters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        for kept in self._pristine:
            merged = dict(self.base_layer.named_parameters(recurse=False))
            for key, parameter in kept.named_parameters(recurse=False):
                if key in merged and merged[key] is not parameter:
                    yield merged[key], parameter

    def freeze_all_but(self, names: Collection[str]) -> None:
        freeze_all_but(self.holders(), names)

    def let_train(self, name: str, requires_grad: bool) -> None:
        factors = dict(zip(self.factor_names, "AB", strict=True))
        for key, parameter in self.stored_parameters(name).items():
            parameter.requires_grad_(requires_grad and factors.get(key, "") in self.adapters[name].trains)

    def counting(self) -> list[Adapter]:
        """The adapters that change the output now; in a batch that mixes adapters, of the rows that are looked at.

        Raises:
            BackendError: they differ from row to row, and all rows are looked at.
        """
        if self._disable_adapters or self.merged_adapters:
            return []
        return [self.adapters[name] for name in self.in_force() if name in self.adapters]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update of an adapter is a matrix, so that :func:`lorafa.convert_to_lora` makes LoRA of it."""
        return adapter_name not in self.adapters or self.adapters[adapter_name].variant.uniform

    # ---- scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the scaling to ``scale`` times alpha / r (or alpha / sqrt(r))."""
        if adapter in self.adapters:
            self.adapters[adapter].scaling = scale * self.adapters[adapter].initial_scaling

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for adapter in self._active_here():
            adapter.scaling = adapter.written_scaling * scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by ``scale``, or set it back to its start."""
        for adapter in self._active_here():
            adapter.scaling = adapter.initial_scaling if scale is None else adapter.written_scaling / scale

    def _active_here(self) -> list[Adapter]:
        return [self.adapters[name] for name in self._active_adapter if name in self.adapters]

    def before_rescaling(self) -> None:
        """Bring the base back from which s B0 A0 was taken out for the scaling it had.

        A merged update stays in the weight as it was merged; unmerging takes off just that.
        """
        if self.without_start:
            self.unmerge()

    # ---- weights

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight, in the layout and dtype of the base layer's own weight."""
        return self.backend.to_layout(in_memory(self.pristine), self.adapters[adapter].delta_weight(self.base_weight()))

    merged_base, merged_weight, with_changes = merging.merged_base, merging.merged_weight, merging.with_changes
    require_mergeable, updated_bias = merging.require_mergeable, merging.updated_bias

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
        rows = self.mixing()
        if rows is not None:
            return self.mixed_forward(rows, x, *args, **kwargs)
        adapters = self.counting()
        if not adapters:
            return self.run_base(self.running_base(), x, *args, **kwargs)
        if len(adapters) == 1 and not args and not kwargs and adapters[0].as_made:
            fused = adapters[0].variant.fused(adapters[0], x)
            if fused is not None:
                return fused
        y = self.base_output(x, *args, **kwargs)
        if isinstance(y, Tensor):
            x = x.to(y.device)  # where a hook of the base layer may have brought it
        out = y
        for adapter in adapters:
            change = adapter.delta_output(x, y)
            self.require_fitting(out, change)
            out = out + change.to(out.dtype)
        return out

    def mixed_forward(self, rows: Rows, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output where each row has adapters of its own."""
        return mixed.output(self, rows, x, args, kwargs)

    def require_fitting(self, y: Any, change: Tensor) -> None:
        """Raise BackendError unless an output, or a part of it, is a tensor of the shape of an adapter's change."""
        if not isinstance(y, Tensor) or y.shape != change.shape:
            found = tuple(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise BackendError(
                f"A {described(self.base_layer)} gives {found} where an adapter on it gives {tuple(change.shape)}: its "
                "forward or a hook makes something else of x W^T + b. Leave it out with exclude_modules."
            )

    def __getattr__(self, name: str) -> Any:
        """What the layer lacks is the base layer's: ``stride``, ``num_embeddings``, ``head_dim`` ...

        Not what is private, nor what adapters have: of these the base layer's are no answer.
        """
        modules = self.__dict__.get("_modules") or {}
        if name in modules:
            return modules[name]
        base = None if name.startswith(_NOT_THE_BASE) or hasattr(type(self), name) else modules.get("base_layer")
        found = _MISSING if base is None else getattr(self.running_base(), name, _MISSING)
        return super().__getattr__(name) if found is _MISSING else found

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: r={a.rank}, scaling={float(a.scaling):g}" for name, a in self.adapters.items())
