"""A phase of the teacher in new directions: what is learnt so far is carried beside, frozen, and folded in at the end.

    s B A  ->  s (B1 A1 + B A)  with A along the gradient of the joint loss, B = 0   ->   s [B1 A1 + B A]_r

The part that is carried stands on each layer as a frozen start (:class:`lorafa.adapter.Start`), so that whatever reads
an adapter, its files too, has the whole update at any moment: as the plain LoRA of rank 2 r that it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorafa.adapter import Start
from lorafa.alignment.teachers.products import Pair, trained_pairs
from lorafa.errors import AdapterError
from lorafa.numerics.low_rank import nearest_product
from lorafa.surgery.plain import stacked
from lorafa.surgery.walk import lora_layers, uncompiled_name

Stats = Mapping[str, Mapping[str, Tensor]]
"""Layer -> tensors of the sketch of its gradient; see :func:`lorafa.alignment.gradients.sketched`."""


class Carry:
    """The updates of a model while a phase goes on in new directions."""

    def __init__(self, model: nn.Module) -> None:
        """Look at the adapters that are trained.

        Raises:
            AdapterError: one of them is not s B A with both factors trained, or has a frozen start already.
        """
        self.pairs = trained_pairs(model, "align.reorient=true cuts", "Leave it off")
        _require_all(model, self.pairs)
        self._parameters = {uncompiled_name(name): p for name, p in model.named_parameters()}
        self.on = False
        """Whether a phase goes on."""

    @torch.no_grad()
    def begin(self, stats: Stats, optimizer: Optimizer | None) -> int:
        """Carry the update of every layer from here on, with new A, and B = 0: the function stays what it is.

        The rows of A are those of LoRA-One, sqrt(sigma_i) v_i for the leading triplets of the gradient, as large
        together as A was. What an optimizer knows of A and B is of other directions, and begins anew.

        Returns:
            The layers whose A stays, because their gradient has fewer directions than their rank.
        """
        kept = 0
        for pair in self.pairs:
            (A, B), (p_A, p_B) = self._factors(pair), self._of(pair)
            directions = _directions(stats.get(pair.path), A)
            pair.layer.lora_start[pair.name] = Start(A.clone(), -B)
            kept += directions is None
            if directions is not None:
                p_A.copy_(pair.layer.stored_A(directions))
            p_B.zero_()
            pair.layer.adapters_changed()
        self._forget(optimizer)
        self.on = True
        return kept

    @torch.no_grad()
    def end(self, optimizer: Optimizer | None) -> float:
        """Fold what was carried into A and B, cut to their rank.

        Returns:
            The share of the squared norm of the updates that the ranks could not hold.
        """
        kept = lost = 0.0
        for pair in self.pairs:
            A, B, squares = self._folded(pair)
            rank = A.shape[-2]
            kept, lost = kept + float(squares.sum()), lost + float(squares[..., rank:].sum())
            p_A, p_B = self._of(pair)
            p_A.copy_(pair.layer.stored_A(A))
            p_B.copy_(pair.layer.stored_B(B))
        self.drop()
        self._forget(optimizer)
        return lost / kept if kept else 0.0

    def drop(self) -> None:
        """Carry nothing any more, and leave A and B as they are."""
        for pair in self.pairs:
            if pair.name in pair.layer.lora_start:
                del pair.layer.lora_start[pair.name]
            pair.layer.adapters_changed()
        self.on = False

    @contextmanager
    def without(self) -> Iterator[None]:
        """The layers carry nothing inside the block: another state of A and B stands for itself."""
        held = [(pair, _start(pair)) for pair in self.pairs] if self.on else []
        try:
            for pair, _ in held:
                del pair.layer.lora_start[pair.name]
            yield
        finally:
            for pair, start in held:
                pair.layer.lora_start[pair.name] = start

    @contextmanager
    def folded(self) -> Iterator[None]:
        """A and B hold the whole update inside the block, cut to their rank, for who reads parameters alone."""
        if not self.on:
            yield
            return
        own = {name: self._parameters[name].data for pair in self.pairs for name in (pair.A, pair.B)}
        try:
            for pair in self.pairs:
                A, B, _ = self._folded(pair)
                p_A, p_B = self._of(pair)
                p_A.data = pair.layer.stored_A(A).to(p_A).contiguous()
                p_B.data = pair.layer.stored_B(B).to(p_B).contiguous()
            with self.without():
                yield
        finally:
            for name, value in own.items():
                self._parameters[name].data = value

    def state_dict(self) -> dict[str, Any]:
        """What is carried, by the name of A's parameter; empty outside of a phase."""
        if not self.on:
            return {}
        starts = ((pair.A, _start(pair)) for pair in self.pairs)
        return {name: {"A": start.A.clone(), "B": start.B.clone()} for name, start in starts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Carry what was carried when the state was kept; A and B are left to who loads the model."""
        self.drop()
        for pair in self.pairs if state else ():
            like = self._of(pair)[0]
            factors = (state[pair.A][key].to(like) for key in ("A", "B"))
            pair.layer.lora_start[pair.name] = Start(*factors)
            pair.layer.adapters_changed()
        self.on = bool(state)

    def _of(self, pair: Pair) -> tuple[nn.Parameter, nn.Parameter]:
        return self._parameters[pair.A], self._parameters[pair.B]

    def _factors(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """Copies of A (..., r, in) and B (..., out, r), in the parameters' dtype."""
        p_A, p_B = self._of(pair)
        return pair.layer.matrix_A(p_A.detach()).clone(), pair.layer.matrix_B(p_B.detach()).clone()

    def _folded(self, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
        """A and B of the whole update, cut to the rank, and all squared singular values of s B A in float64.

        The rows of A are orthogonal and as large together as those that were carried: what B learns by a step does not
        depend on how large the update has become.
        """
        (A, B), start = self._factors(pair), _start(pair)
        rank = A.shape[-2]
        V, US, S = nearest_product(*stacked((A, B), start), rank)
        size = torch.linalg.matrix_norm(start.A.to(V))[..., None, None] / rank**0.5
        size = torch.where(size > 0, size, torch.ones_like(size))
        return V * size, US / size, S.double().square() * pair.square_of_scaling

    def _forget(self, optimizer: Optimizer | None) -> None:
        for pair in self.pairs if optimizer is not None else ():
            for parameter in self._of(pair):
                begin_anew(optimizer.state.get(parameter, {}))  # type: ignore[union-attr]


def _start(pair: Pair) -> Start:
    return cast(Start, pair.layer.lora_start[pair.name])


def begin_anew(state: dict[str, Any]) -> None:
    """Let an optimizer begin anew with a parameter: moments, and the steps they are corrected by."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            value.zero_()
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            state[key] = type(value)(0)


def _directions(found: Mapping[str, Tensor] | None, A: Tensor) -> Tensor | None:
    """New A (r, in) as large as ``A``, along the leading right singular vectors of a gradient; None without enough."""
    rank = A.shape[-2]
    if found is None or A.dim() != 2:
        return None
    S, Vh = found["gradient.S"], found["gradient.Vh"]
    usable = len(S) >= rank and bool(S.isfinite().all()) and float(S[rank - 1]) > 1e-6 * float(S[0])
    if not usable:
        return None
    rows = S[:rank, None].sqrt() * Vh[:rank]
    size = torch.linalg.matrix_norm(A.to(rows))
    if not float(size) > 0:
        return None
    scaled: Tensor = rows * (size / torch.linalg.matrix_norm(rows))
    return scaled.to(A)


def _require_all(model: nn.Module, pairs: list[Pair]) -> None:
    named = {(id(pair.layer), pair.name) for pair in pairs}
    trained = {name for _, name in named}
    for path, layer in lora_layers(model):
        for name, adapter in layer.adapters.items():
            problem = None
            if (id(layer), name) in named and adapter.start is not None:
                problem = "has a frozen start already, as PiSSA's has"
            elif name in trained and (id(layer), name) not in named:
                problem = "is not trained with both of its factors, or is another layer's"
            if problem is not None:
                raise AdapterError(
                    f"align.reorient=true carries the update of each layer as a frozen start, and that of {path!r} "
                    f"{problem}. Leave it off, or take a start that leaves the base alone and train A and B."
                )
    if not pairs:
        raise AdapterError(
            "align.reorient=true gives A new directions, and no adapter is trained here with both of its factors. "
            "Leave it off."
        )
