"""Causal attention on a CPU in blocks of queries, as an attention implementation of transformers.

PyTorch's fused attention on a CPU takes three to four times as long as it need for the batches that adapters are
trained on: some rows of some hundred tokens. Here plain matrix products do the work, over as many rows and heads at
once as fit into the cache. What backward reads are queries, keys and values alone; the weights are computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from lorafa.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lorafa_blocks"
"""What the implementation is called in transformers."""
QUERIES = 64
"""Queries of one block: keys after the last of them are not looked at, so few products are made for nothing."""
SCORE_BYTES = 4 * 2**20
"""Float32 scores of one block, at most, unless a single row has more: they stay in the cache."""


def use_blocks(model: PreTrainedModel) -> None:
    """Let a model whose attention is PyTorch's compute it in blocks where it can: see :func:`attention_in_blocks`.

    A model that does anything else with its attention keeps it: what it says of a few tokens must not change. Where
    there are no weights, on the meta device, that is taken for granted.
    """
    served = getattr(model.config, "_attn_implementation", None) == "sdpa" and not model.config.is_encoder_decoder
    if not served or not model._can_set_attn_implementation():
        return
    _register()
    if model.device.type == "meta":
        model.set_attn_implementation(NAME)
        return
    ids = torch.arange(8, device=model.device).remainder(model.get_input_embeddings().weight.shape[0])[None]
    with evaluating(model):
        before = model(input_ids=ids, use_cache=False).logits
        try:
            model.set_attn_implementation(NAME)
            after = model(input_ids=ids, use_cache=False).logits
        except Exception:  # any architecture may fail in its own way, and need not be changed
            after = torch.full_like(before, torch.nan)
    # Two ways of rounding part by 1 to 2 % in bfloat16, single numbers by more; another formula by as much as there is.
    tolerance = 1e-4 if before.dtype in (torch.float32, torch.float64) else 5e-2
    if not bool((after - before).float().norm() <= tolerance * before.float().norm()):
        model.set_attn_implementation("sdpa")


def _register() -> None:
    """Make the name known to transformers, whose registry of attention functions is the one there is."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_in_blocks)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_in_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Softmax attention of (rows, heads, tokens, size); (rows, tokens, heads, size).

    Causal attention of whole rows on a CPU is computed in blocks; all else (a mask, dropout, a single new token, other
    devices, a compiled model) is transformers' own ``sdpa``.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and dropout == 0.0 and causal is True and not any(map(_is_given, rest.items()))
    if not plain or not _is_served(query, key, value):
        kept = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **rest}
        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kept)
        return out
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, scale).transpose(1, 2), None


_READ = ("softcap", "position_bias", "cache", "s_aux", "output_attentions")
"""What else transformers hands over that would change the result."""


def _is_given(argument: tuple[str, Any]) -> bool:
    name, value = argument
    return name in _READ and value is not None and value is not False


_PLAIN = (Tensor, nn.Parameter, FakeTensor)
"""Other classes of tensors, spread over processes for example, have rules of their own."""


def _is_served(query: Tensor, key: Tensor, value: Tensor) -> bool:
    tensors = (query, key, value)
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and all(type(one) in _PLAIN and one.device.type == "cpu" for one in tensors)
        and len({one.dtype for one in tensors}) == 1
        and not torch.is_autocast_enabled("cpu")
        and query.shape[2] == key.shape[2] == value.shape[2] > 1
        and query.shape[1] % key.shape[1] == 0
    )


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``softmax(scale * q @ k.T) @ v`` over the tokens up to each one's own.

    Args:
        query: (rows, heads, tokens, size).
        key, value: (rows, fewer heads, tokens, size); each of them serves as many neighbouring heads of the queries.

    Returns:
        (rows, heads, tokens, size of the values). Scores are rounded to the dtype of the queries, as by plain
        products; the softmax is computed in float32 at least.
    """
    return _CausalAttention.apply(query, key, value, scale)  # type: ignore[no-any-return,no-untyped-call]


class _CausalAttention(torch.autograd.Function):
    """Queries of one key head are stacked, so that a product is one of (heads of a group x tokens, size)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        rows, heads, tokens, _ = query.shape
        out = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
        for chosen, start, end in _blocks(query):
            keys, values = _of_keys(key[chosen, :, :end]), _of_keys(value[chosen, :, :end])
            weights = _weights(_stacked(query[chosen, :, start:end], len(keys)), keys, scale, end - start)
            part = torch.bmm(weights.to(query.dtype), values)
            out[chosen, :, start:end] = part.view(-1, heads, end - start, value.shape[-1])
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        heads, size = query.shape[1], query.shape[-1]
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros(one.shape, dtype=one.dtype) for one in (key, value))
        for chosen, start, end in _blocks(query):
            keys, values = _of_keys(key[chosen, :, :end]), _of_keys(value[chosen, :, :end])
            queries = _stacked(query[chosen, :, start:end], len(keys))
            grads = _stacked(grad_out[chosen, :, start:end], len(keys))
            weights = _weights(queries, keys, ctx.scale, end - start)
            _of_keys(grad_value[chosen])[:, :end].baddbmm_(weights.to(query.dtype).transpose(1, 2), grads)
            grad = torch.bmm(grads, values.transpose(1, 2)).to(weights.dtype)
            grad = torch._softmax_backward_data(grad, weights, -1, weights.dtype).to(query.dtype)
            part = torch.baddbmm(grad.new_empty(()), grad, keys, beta=0, alpha=ctx.scale)
            grad_query[chosen, :, start:end] = part.view(-1, heads, end - start, size)
            _of_keys(grad_key[chosen])[:, :end].baddbmm_(grad.transpose(1, 2), queries, alpha=ctx.scale)
        return grad_query, grad_key, grad_value, None


def _blocks(query: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Rows, and the first and last query of each block."""
    rows, heads, tokens, _ = query.shape
    together = max(1, SCORE_BYTES // (4 * heads * QUERIES * tokens))
    for first in range(0, rows, together):
        for start in range(0, tokens, QUERIES):
            yield slice(first, first + together), start, min(start + QUERIES, tokens)


def _of_keys(part: Tensor) -> Tensor:
    """(rows, heads, tokens, size) -> (rows x heads, tokens, size)."""
    return part.reshape(-1, *part.shape[2:])


def _stacked(part: Tensor, groups: int) -> Tensor:
    """(rows, heads, queries, size) -> (rows x key heads, heads of a group x queries, size)."""
    return part.reshape(groups, -1, part.shape[-1])


def _weights(queries: Tensor, keys: Tensor, scale: float, count: int) -> Tensor:
    """(groups, heads x count, keys), float32 at least: what each of the last ``count`` tokens takes of those before."""
    scores = torch.baddbmm(queries.new_empty(()), queries, keys.transpose(1, 2), beta=0, alpha=scale)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    later = scores.new_full((count, count), -torch.inf).triu_(1)
    scores.view(len(scores), -1, count, scores.shape[-1])[..., -count:].add_(later)
    return scores.softmax(-1)
