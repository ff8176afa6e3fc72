"""LoraModel: the user's model with its adapters, their configs, which of them count, and the call that runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from lorafa.adapter import Variant
from lorafa.config import LoraConfig
from lorafa.context import EMPTY, CurrentCall, ForwardContext
from lorafa.errors import AdapterError, ConfigError, shorten, warn
from lorafa.layers.base import LoraLayer
from lorafa.layers.host import Host
from lorafa.numerics.fused import is_traced
from lorafa.processes import world_size
from lorafa.surgery import activate
from lorafa.surgery.apply import apply
from lorafa.surgery.asked import AskedByName
from lorafa.surgery.biases import BaseBiases
from lorafa.surgery.build import Options
from lorafa.surgery.combination import Combination
from lorafa.surgery.combine import add_combination
from lorafa.surgery.combining import Combining, check_weights
from lorafa.surgery.forward import is_checkpointed
from lorafa.surgery.given import lora_config
from lorafa.surgery.merge import merge_adapter, unload, unmerge_adapter
from lorafa.surgery.mixed import in_pass, rows_of
from lorafa.surgery.plan import Plan, plan
from lorafa.surgery.resize import resize_vocabulary
from lorafa.surgery.resolve import Resolved, resolve
from lorafa.surgery.stats import Stats
from lorafa.surgery.verify import MergeCheck, verified
from lorafa.surgery.walk import hosts, lora_layers, require_module, wrapped_places


class LoraModel(AskedByName, nn.Module):
    """``model`` is the user's, changed in place; ``peft_config`` maps adapters to the configs they were made from."""

    prefix = "lora_"
    tuner_layer_cls = LoraLayer

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """Hold ``model``; with a config also put its adapter on, which then counts and trains, as PEFT does.

        Raises:
            LoraError: as :func:`lorafa.get_peft_model`; ``model`` is as it was then.
        """
        super().__init__()
        self.model = require_module(model)
        self.peft_config: dict[str, LoraConfig] = {}
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.call = next((layer.call for _, layer in lora_layers(model)), CurrentCall())
        self._readers = {  # of the adapters that have to know, or gather, something of each call
            name: adapter.variant
            for _, layer in lora_layers(model)
            for name, adapter in layer.adapters.items()
            if _reads(adapter.variant)
        }
        self._wrapped: list[str] = []  # the places wrappers were put on
        self._biases = BaseBiases()
        self.training = model.training
        if peft_config is not None:
            activate.require_nothing_merged(model)
            config = lora_config(peft_config)
            self.put_on(config, adapter_name, Options(low_cpu_mem_usage=low_cpu_mem_usage))
            self.set_adapter(adapter_name, config.inference_mode)

    # ---- adapters

    def plan_adapter(
        self, resolved: Resolved, adapter_name: str, options: Options | None = None, stats: Stats | None = None
    ) -> Plan:
        """Everything that adding the adapter would do, built and checked; changes nothing.

        Raises:
            ConfigError: another adapter trains the base's biases, and so would this one.
            AdapterError: it would train those of a base that an update is merged into.
            LoraError: as :func:`lorafa.surgery.plan.plan`.
        """
        config = resolved.config
        others = [name for name, other in self.peft_config.items() if other.bias != "none"]
        if config.bias != "none" and others:
            raise ConfigError(
                f"bias={config.bias!r}: adapter {others[0]!r} trains base biases already, and there is only one set of "
                "them. Use bias='none' for all adapters but one."
            )
        if config.bias != "none":
            activate.require_nothing_merged(self.model)
        return plan(resolved, adapter_name, options, stats)

    def apply_plan(self, planned: Plan) -> Callable[[], None]:
        """Carry out a plan and return how to take it back; the adapter is inactive until :meth:`set_adapter`."""
        named = self.targeted_module_names, self.targeted_parameter_names, self._wrapped
        before = [host for _, host in hosts(self.model)]
        active, off = _active(before), any(host.disable_adapters for host in before)
        undo = apply(self.model, planned, self.call)
        targets = planned.targets
        modules = [t.name for t in targets if t.parameter is None]
        parameters = [f"{t.name}.{t.parameter}" for t in targets if t.parameter is not None]
        self.targeted_module_names = list(dict.fromkeys([*self.targeted_module_names, *modules]))
        self.targeted_parameter_names = list(dict.fromkeys([*self.targeted_parameter_names, *parameters]))
        self.peft_config[planned.name], self._wrapped = planned.config, wrapped_places(self.model)
        self._biases.take(planned.name, self.model, planned.config.bias)
        readers = [layer.parts.variant for layer in planned.layers if _reads(layer.parts.variant)]
        if readers:  # of one config, so any of them finds the same
            self._readers[planned.name] = readers[0]
        if active:  # other adapters keep counting; the new one waits
            activate.set_requires_grad(self.model, planned.name, False)
            for _, host in hosts(self.model):
                host.activate(active)
                host.enable_adapters(not off)

        def take_back() -> None:
            undo()
            self.targeted_module_names, self.targeted_parameter_names, self._wrapped = named
            del self.peft_config[planned.name]
            self._readers.pop(planned.name, None)
            self._biases.forget(planned.name)

        return take_back

    def put_on(
        self, config: LoraConfig, adapter_name: str, options: Options | None = None, stats: Stats | None = None
    ) -> None:
        """Add a new adapter; a failure leaves the model as it was.

        Raises:
            ConfigError: its start is computed from the weights or from ``stats``, and ``low_cpu_mem_usage`` computes
                none.
        """
        self.inject_resolved(resolve(self.model, lora_config(config)), adapter_name, options, stats)

    def inject_resolved(
        self, resolved: Resolved, adapter_name: str, options: Options | None = None, stats: Stats | None = None
    ) -> None:
        """The same, for a config that has met the model."""
        reads_weight = resolved.start.initializer.reads_weight
        if options is not None and options.low_cpu_mem_usage and (reads_weight or stats):
            raise ConfigError(
                f"init_lora_weights={resolved.config.init_lora_weights!r} computes its start from the "
                f"{'weight' if reads_weight else 'statistics'}, but low_cpu_mem_usage=True computes none. Drop one of "
                "the two."
            )
        self.apply_plan(self.plan_adapter(resolved, adapter_name, options, stats))

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
        """Combine adapters to a new one; see :meth:`lorafa.PeftModel.add_weighted_adapter`."""
        given = dict(zip(adapters, check_weights(adapters, weights), strict=True))
        asked = Combining(
            combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method, seed
        )
        return add_combination(self.model, self.peft_config, given, adapter_name, asked, self.apply_plan)

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that count on some layer, together; a layer may be told otherwise by itself."""
        return _active(host for _, host in hosts(self.model))

    @property
    def active_adapter(self) -> str | list[str]:
        """The one adapter that counts, or a list where it is another number."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters count, together, and train unless ``inference_mode``."""
        activate.set_adapter(self.model, adapter_name, inference_mode)
        self._biases.let_train([] if inference_mode else _listed(adapter_name))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let adapters train, or freeze them."""
        activate.set_requires_grad(self.model, adapter_names, requires_grad)
        for name in _listed(adapter_names):
            self._biases.set_requires_grad(name, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the only active one, another (if any) becomes active.

        Biases of the base that it has trained are the base's own again.

        Raises:
            AdapterError: an unknown name, the adapter is merged, or one is merged and another would become active, or
                biases would change; nothing was changed.
        """
        rest = [name for name in self.peft_config if name != adapter_name]
        successor = rest[0] if rest and set(self.active_adapters) <= {adapter_name} else None
        if adapter_name in self._biases:
            activate.require_nothing_merged(self.model)
        activate.delete_adapter(self.model, adapter_name, successor)
        self._biases.give_back(adapter_name)
        del self.peft_config[adapter_name]
        self._readers.pop(adapter_name, None)

    def enable_adapter_layers(self) -> None:
        activate.enable_adapters(self.model, True)

    def disable_adapter_layers(self) -> None:
        activate.enable_adapters(self.model, False)

    # ---- weights

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        verify: bool | Mapping[str, Any] = False,
    ) -> MergeCheck | None:
        """Put updates into the base weights until :meth:`unmerge_adapter`; always as safe as ``safe_merge`` asks."""
        self.say_lost()
        check = verified(self.model, verify, adapter_names)
        merge_adapter(self.model, adapter_names)
        return check

    def unmerge_adapter(self) -> None:
        """Bring the pristine base weights back, bit for bit."""
        unmerge_adapter(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        verify: bool | Mapping[str, Any] = False,
    ) -> nn.Module:
        """The user's model with the updates folded in and every wrapper gone."""
        verified(self.model, verify, adapter_names)
        return self._unload(merge=True, adapter_names=adapter_names)

    def unload(self) -> nn.Module:
        """The user's model as it was before any adapter, bit for bit; layers LoftQ has quantized stay so."""
        return self._unload(merge=False)

    def _unload(self, *, merge: bool, adapter_names: Sequence[str] | None = None) -> nn.Module:
        if not self.peft_config:
            raise AdapterError(
                "The adapters were taken off this model already. Call get_peft_model on it to put a new one on."
            )
        if merge:
            self.say_lost()
        folded = [*(self.active_adapters if adapter_names is None else adapter_names)] if merge else []
        folded += [name for layer in lora_layers(self.model) for name in layer[1].merged_adapters] if merge else []
        model = unload(self.model, merge=merge, adapter_names=adapter_names)
        for name in self.peft_config:
            self._biases.forget(name) if name in folded else self._biases.give_back(name)
        self.peft_config, self._readers, self._wrapped = {}, {}, []
        return model

    def say_lost(self) -> None:
        """Warn where something put on the model is there no more, because another module was set in its place."""
        now = wrapped_places(self.model)
        if len(now) < len(self._wrapped):
            lost = [name for name in self._wrapped if name not in now]
            warn(
                f"{shorten(map(repr, lost), 3)} no longer {'carries' if len(lost) == 1 else 'carry'} what the adapters "
                "put there: other modules have taken the places, as resizing or an assignment sets them. What was "
                "trained there is lost: it is neither saved nor merged."
            )

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **settings: Any) -> Any:
        """The wrapped model's method, where no adapter is on a table that it would replace.

        The new rows are the base's and are not trained; :meth:`lorafa.PeftModel.save_pretrained` saves them.

        Raises:
            AdapterError: an adapter, a copy (``modules_to_save``) or trained rows are on a table; nothing was changed.
        """
        return resize_vocabulary(self.model, new_num_tokens, *args, **settings)

    def lora_layers(self) -> list[tuple[str, LoraLayer]]:
        """Every adapted layer with its path in the user's model."""
        return list(lora_layers(self.model))

    # ---- running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def calling(
        self, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], *, keeps: bool, steps: bool = False
    ) -> Any:
        """``function(*args, **kwargs)``, a call of the model, with what adapters have to know of it where they read it.

        Args:
            keeps: whether a backward pass may follow, which runs layers again under activation checkpointing.
            steps: whether it runs the model many times, each time on other tokens, as ``generate`` does.
        """
        named = kwargs.get("adapter_names")
        kwargs = {name: value for name, value in kwargs.items() if name != "adapter_names"}
        if not self._readers and named is None:
            return self._plain(function, args, kwargs, keeps=keeps)
        arguments = _by_name(self.model.forward, args, kwargs)
        rows = None if named is None else rows_of(self.model, named, self.peft_config, arguments, trains=keeps)
        active = self.active_adapters if rows is None else rows.names
        readers = {name: variant for name, variant in self._readers.items() if name in active}
        facts = {name: variant.fact(arguments) for name, variant in readers.items()}
        theirs = frozenset[str]().union(*(variant.call_arguments for variant in self._readers.values()))
        kwargs = {name: value for name, value in kwargs.items() if name not in theirs}
        context = ForwardContext(facts, rows) if facts or rows is not None else EMPTY
        stepping = self._stepping(readers, context) if steps and context is not EMPTY else nullcontext()
        read_again = rows is not None or any(variant.reads_call for variant in readers.values())
        with (
            self.call.holding(
                context,
                keeps=keeps,
                recomputes=lambda: read_again and is_checkpointed(self.model),
                layers=lambda: dict(hosts(self.model)),
                casts=world_size() == 1,
            ) as passed,
            stepping,
        ):
            return passed(function(*args, **kwargs))

    def _plain(self, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], *, keeps: bool) -> Any:
        """A call of which adapters have nothing to know; neither it nor its backward pass goes by another one.

        What is traced as a whole has no layers that run again from here.
        """
        if is_traced() or not (keeps or self.call.opened):
            return function(*args, **kwargs)
        casts = world_size() == 1  # several exchange gradients as soon as a layer has them, and ask which have none
        with self.call.holding(
            EMPTY, keeps=keeps, recomputes=lambda: is_checkpointed(self.model), casts=casts
        ) as passed:
            return passed(function(*args, **kwargs))

    @contextmanager
    def _stepping(self, readers: Mapping[str, Variant], context: ForwardContext) -> Iterator[None]:
        """Let the readers see each forward pass of the model inside before it runs."""

        held = context

        def before(model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
            nonlocal held
            if self.call.opened is not held:  # another call, inside this one or of another thread
                return
            arguments = _by_name(self.model.forward, args, kwargs)
            facts = {name: variant.step(context.facts[name], arguments) for name, variant in readers.items()}
            rows = None if context.rows is None else in_pass(context.rows, arguments)
            held = ForwardContext(facts, rows)
            self.call.step(held)

        handle = self.model.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def _reads(variant: Variant) -> bool:
    """Whether it has to know, or gathers, something of each call of the model."""
    return variant.reads_call or variant.gathers


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _active(found: Iterable[Host]) -> list[str]:
    return list(dict.fromkeys(name for host in found for name in host.active_adapters))


def _by_name(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names that the model's forward has for them."""
    names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return dict(zip(names, args, strict=False)) | dict(kwargs)
