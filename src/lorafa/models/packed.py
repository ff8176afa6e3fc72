"""Whether a model keeps the samples of a packed row apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorafa.models.modes import evaluating

_LENGTHS = (5, 3, 4)


def mixes_samples(model: nn.Module) -> str | None:
    """Why a causal language model cannot be trained on packed rows; None where it can.

    Compares its outputs for a few short samples in one row, apart by their positions, with those for each alone:
    architectures differ in what they read beside the positions, and a list of those we know would pass over the others.
    """
    weight = next(model.parameters())
    if weight.device.type == "meta":
        return "it has no weights yet (they are on the meta device)"
    rows = [torch.arange(3 + length, 3 + 2 * length, device=weight.device).remainder(11) for length in _LENGTHS]
    positions = [torch.arange(length, device=weight.device) for length in _LENGTHS]
    try:
        with evaluating(model):
            packed = torch.split(_logits(model, torch.cat(rows), torch.cat(positions)), list(_LENGTHS))
            alone = [_logits(model, row, place) for row, place in zip(rows, positions, strict=True)]
            other = torch.cat([rows[0].add(1).remainder(11), *rows[1:]])
            beside = torch.split(_logits(model, other, torch.cat(positions)), list(_LENGTHS))
    except Exception as error:  # any architecture may fail in its own way: the reason goes to the caller
        return f"a trial failed ({type(error).__name__}: {error})"
    apart = max(float((one - other).abs().max()) for one, other in zip(packed, alone, strict=True))
    scale = max(float(one.abs().max()) for one in alone)
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    # Behind another first sample the same numbers are added up in the same order, so no rounding hides a difference.
    moved = max(float((one - two).abs().max()) for one, two in zip(packed[1:], beside[1:], strict=True))
    apart = apart if moved <= 1e-4 * scale else max(apart, moved)
    if not (apart <= tolerance * scale and moved <= 1e-4 * scale):
        return f"its output for a sample changes by {apart / scale:.1%} of the largest where others stand before it"
    return None


def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    """(tokens, vocabulary), of one row."""
    logits: Tensor = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
    return logits.float()
