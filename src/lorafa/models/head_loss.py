"""The loss of a causal language model at its supervised positions, without ever holding all logits.

Where a frozen head meets a large vocabulary, the logits are the largest tensor of a training step: tokens x vocabulary,
in the model's dtype, again in float32, and again as their gradient. Here only the positions whose next label counts
reach the head, a chunk of rows at a time, and the gradient with respect to the chunk's hidden states is taken while its
logits are still there. What stays for the backward pass is one (supervised tokens, hidden size) tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorafa.errors import BackendError, DataError
from lorafa.models.modes import evaluating
from lorafa.models.rows import IGNORE_INDEX, ROW_MULTIPLE, filled_up
from lorafa.models.wrapped import inner_model
from lorafa.storage.tensors import can_be_gathered

CHUNK_BYTES = 32 * 2**20
"""Size of one chunk of logits: large enough for an efficient product, small beside any model's activations."""
CPU_ROWS = 8
"""Rows of a chunk that are in float32 at a time on a CPU: they stay in the cache, those of a teacher beside them too.
"""

# What models do between the head and the loss, by the name of the config field that says how much.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
_DIVISORS = ("logits_scaling",)  # Granite, HyperCLOVA X
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")  # Gemma 2 and later, NanoChat; RecurrentGemma

AUTOCAST = "_original_forward"
"""What accelerate leaves on a model whose forward it has put under autocast; the trainer does so with the loss."""


@dataclass(frozen=True)
class LogitTransform:
    """logits -> softcap * tanh(scale * logits / softcap), or scale * logits where there is no softcap."""

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """Transform ``logits`` (rows, vocabulary) in place and return them."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def gradient_(self, grad: Tensor, transformed: Tensor) -> Tensor:
        """d loss / d logits from d loss / d transformed (rows, vocabulary), in place; overwrites ``transformed``."""
        if self.softcap is not None:
            grad.mul_(transformed.div_(self.softcap).square_().neg_().add_(1.0))  # tanh' = 1 - tanh^2
        if self.scale != 1.0:
            grad.mul_(self.scale)
        return grad


@dataclass(frozen=True)
class CausalParts:
    """A causal language model, cut where its head begins."""

    whole: nn.Module
    """The causal language model."""
    body: nn.Module
    head: nn.Linear
    transform: LogitTransform


@dataclass(frozen=True)
class HiddenStates:
    """What a causal language model has computed of a batch, up to its head."""

    last: Tensor
    """(batch, tokens, size): what the head reads."""
    head: nn.Linear
    """(size) -> (vocabulary)."""
    transform: LogitTransform
    """What becomes of the head's output."""
    inner: Mapping[int, Tensor] = field(default_factory=dict)
    """(batch, tokens, size) after so many layers, those that :attr:`Objective.layers` names; 0 is the embedding, and
    after all layers it is :attr:`last`, which the norm before the head has made."""
    depth: int | None = None
    """The number of all layers, where inner states were asked for."""


class Objective(Protocol):
    """What is minimized, as a function of hidden states."""

    @property
    def layers(self) -> tuple[int, ...]:
        """The inner states it reads, beside the last one."""

    def __call__(self, states: HiddenStates, targets: Tensor, chunk_tokens: int | None) -> tuple[Tensor, int]:
        """A sum over the supervised positions, and their number.

        Args:
            targets: (batch, tokens), the label of the position's next token, -100 where none counts.
            chunk_tokens: rows that may go through the head at once; None leaves the choice.
        """


class Points(Protocol):
    """A loss of logits at each position, with its gradient."""

    def begin(self, start: int, end: int) -> None:
        """The next calls are of supervised positions ``start`` to ``end``, as they follow each other in the batch."""

    def __call__(self, logits: Tensor, gold: Tensor, first: int, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        """The sum of the loss over positions, and its gradient with respect to the logits.

        Args:
            logits: (rows, vocabulary), float32 or wider, not to be changed; rows after the last ``gold`` are fillers.
            gold: the labels, (positions,).
            first: the supervised position of the first row.
            wants_gradient: give the gradient too, in a new tensor; that of fillers does not matter.
        """


class LogLikelihood:
    """The negative log-likelihood of the labels."""

    def begin(self, start: int, end: int) -> None: ...

    def __call__(self, logits: Tensor, gold: Tensor, first: int, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
        log_probs, target = logits.log_softmax(dim=-1), gold.unsqueeze(1)
        total = -log_probs[: len(target)].gather(1, target).sum()
        if not wants_gradient:
            return total, None
        grad = log_probs.exp_()  # softmax - onehot, in the buffer of the log probabilities
        grad[: len(target)].scatter_add_(1, target, grad.new_full(target.shape, -1.0))
        return total, grad


LOG_LIKELIHOOD: Points = LogLikelihood()


class CrossEntropy:
    """The negative log-likelihood of the labels, in nats."""

    layers: tuple[int, ...] = ()

    def __call__(self, states: HiddenStates, targets: Tensor, chunk_tokens: int | None) -> tuple[Tensor, int]:
        return head_loss(states, targets, chunk_tokens)


CROSS_ENTROPY: Objective = CrossEntropy()


class SupervisedLoss(nn.Module):
    """`supervised_loss` of one model as a module, for what wraps modules: DistributedDataParallel, `torch.compile`."""

    def __init__(self, model: nn.Module, chunk_tokens: int | None = None, objective: Objective = CROSS_ENTROPY) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.objective = objective

    def forward(self, batch: Mapping[str, Any], num_items: Tensor | int | None = None) -> Tensor:
        return supervised_loss(self.model, batch, self.chunk_tokens, num_items, self.objective)


def supervised_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    chunk_tokens: int | None = None,
    num_items: Tensor | int | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> Tensor:
    """Mean negative log-likelihood, in nats, of the labels a batch supervises; a differentiable float32 scalar.

    Equal to the loss the model itself computes from ``labels``, and so are its gradients. The model is called as
    anywhere else, so that hooks on it and on what wraps it run; in the output they see, ``logits`` is None.

    Args:
        model: causal language model of transformers, plain or with adapters; `supports_chunked_loss` says which.
        batch: the model's inputs, with ``labels`` (batch, tokens), -100 where nothing is learnt. Position t is trained
            to predict label t + 1. ``shift_labels`` in place of ``labels`` are already moved by one.
        chunk_tokens: rows that go through the head at once; by default as many as `CHUNK_BYTES` of float32 logits hold.
        num_items: number to divide the summed loss by; by default the supervised positions of this batch. Under
            gradient accumulation it is the count over all batches of the step; a batch without any adds 0 then.
        objective: what is summed over the supervised positions, in place of the negative log-likelihood.

    Raises:
        BackendError: the model cannot be cut before its head, or a hook gives an output without loss.
        DataError: the batch has no labels, none of them counts (without ``num_items``), or they are no labels of its
            tokens.
    """
    return _run(model, batch, chunk_tokens, num_items, objective)[0]


def supervised_nll(
    model: nn.Module,
    batch: Mapping[str, Any],
    chunk_tokens: int | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> tuple[Tensor, int]:
    """Summed negative log-likelihood of a batch, in nats, and the number of its terms; see `supervised_loss`."""
    loss, count = _run(model, batch, chunk_tokens, 1, objective)
    _require_some(count, batch)
    return loss, count


def _run(
    model: nn.Module,
    batch: Mapping[str, Any],
    chunk_tokens: int | None,
    num_items: Tensor | int | None,
    objective: Objective,
) -> tuple[Tensor, int]:
    """The loss as the model's output has it once all hooks have run, and the number of supervised positions."""
    parts = _parts(model)
    if isinstance(parts, str):
        raise BackendError(f"The chunked loss cannot be used: {parts}. Train with the model's own loss instead.")
    if batch.get("labels") is None and batch.get("shift_labels") is None:
        raise DataError(f"A batch for the supervised loss needs 'labels', found only: {', '.join(sorted(batch))}.")
    count = 0

    def forward(**inputs: Any) -> Any:
        nonlocal count
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        targets = _next_labels(labels) if shifted is None else shifted
        states = _hidden_states(parts, inputs, targets, objective.layers)
        _require_fit(targets, states.last, parts.head)

        def of_head(last: Tensor) -> Tensor:
            nonlocal count
            if can_be_gathered(parts.head.weight):
                raise BackendError(
                    "The output head is spread over processes while the model runs, as by tensor parallelism, and "
                    "cannot be applied by its weight. Train with the model's own loss instead."
                )
            total, count = objective(replace(states, last=last), targets, chunk_tokens)
            return total

        if _is_gathered_by_itself(parts.head):  # by its hooks
            with _runs_instead(parts.head, of_head):
                total = parts.head(states.last)
        else:
            total = of_head(states.last)
        if num_items is None:
            _require_some(count, batch)
        return _output(total / (count if num_items is None else num_items))

    with _runs_instead(parts.whole, forward):
        output = model(**batch)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise BackendError(
            f"A hook on the model has replaced its output by {type(output).__name__}, which has no loss. Let the hook "
            "return an output with 'loss', or nothing."
        )
    return loss, count


@contextmanager
def _runs_instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run ``forward`` in place of its own for the length of a with-block; its hooks run as ever.

    Hooks of accelerate, which bring in weights or move inputs, call the forward that the module had before them.
    """
    place = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    own = module.__dict__.get(place)
    module.__dict__[place] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__[place]
        else:
            module.__dict__[place] = own


def _output(loss: Tensor) -> Any:
    """The output of a causal model that has not computed its logits."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(loss=loss)


def _hidden_states(
    parts: CausalParts, inputs: dict[str, Any], targets: Tensor, layers: tuple[int, ...]
) -> HiddenStates:
    """Run the body; ``inputs`` are all the model was called with but labels."""
    if inputs.keys() <= {"input_ids", "attention_mask"} and _padding_is_behind(inputs.get("attention_mask"), targets):
        inputs.pop("attention_mask", None)
    if "use_cache" in inspect.signature(parts.body.forward).parameters:
        inputs["use_cache"] = False
    if not layers:
        return HiddenStates(parts.body(**inputs)[0], parts.head, parts.transform)
    output = parts.body(**inputs, output_hidden_states=True, return_dict=True)
    known, depth = output.hidden_states, len(output.hidden_states) - 1
    missing = [layer for layer in layers if not 0 <= layer <= depth]
    if missing:
        raise BackendError(
            f"The objective reads the states after layer {missing[0]}, and the model has {depth} layers. Name layers "
            f"from 0, the embedding, to {depth}."
        )
    inner = {layer: output[0] if layer == depth else known[layer] for layer in layers}
    return HiddenStates(output[0], parts.head, parts.transform, inner, depth)


def _require_some(count: int, batch: Mapping[str, Any]) -> None:
    """Raises DataError where nothing was supervised: there is no mean of nothing."""
    if count == 0:
        labels = batch.get("labels") if batch.get("shift_labels") is None else batch["shift_labels"]
        raise DataError(
            f"All {labels.numel() if labels is not None else 0} labels of the batch are masked (-100), so it trains "
            "nothing. Check the answer column and the chat template, and that max_length leaves room for the answers."
        )


def _require_fit(targets: Tensor, hidden: Tensor, head: nn.Linear) -> None:
    """Raises DataError unless there is a label for each position, which the head has an output for or which is -100."""
    if targets.shape != hidden.shape[:-1]:
        raise DataError(
            f"The labels are of shape {tuple(targets.shape)}, and the model's positions {tuple(hidden.shape[:-1])}. A "
            f"label for each token is needed, {IGNORE_INDEX} where none counts."
        )
    known = ((targets >= 0) & (targets < head.out_features)) | (targets == IGNORE_INDEX)
    if targets.is_floating_point() or not bool(known.all()):
        found = targets.dtype if targets.is_floating_point() else int(targets[~known][0])
        raise DataError(
            f"Labels must be integers from 0 to {head.out_features - 1}, or {IGNORE_INDEX} where none counts, found "
            f"{found}."
        )


def _padding_is_behind(mask: Tensor | None, next_labels: Tensor) -> bool:
    """Whether all padding comes after the tokens of its row, and nothing is learnt on it.

    A causal model cannot look ahead, so such padding changes nothing at the positions that count; without the mask,
    attention runs its causal kernel, keeps no mask for backward and need not repeat grouped keys and values.
    """
    if mask is None or mask.dim() != 2 or mask.shape != next_labels.shape:
        return False
    ordered = (mask[:, 1:] <= mask[:, :-1]).all()
    learns_on_padding = ((mask == 0) & (next_labels != IGNORE_INDEX)).any()
    return bool(ordered & ~learns_on_padding & (mask[:, 0] != 0).all())


def supports_chunked_loss(model: nn.Module) -> str | None:
    """Why the chunked loss cannot stand in for the model's own loss, or None if it can.

    Looks at the head and then compares both losses on a few tokens, some of them padding: architectures do many things
    between the last hidden state and the loss, and a list of those we know would pass over the others in silence.
    """
    parts = _parts(model)
    if isinstance(parts, str):
        return parts
    weight = parts.head.weight
    if weight.device.type == "meta":
        return "the model has no weights yet (they are on the meta device)"
    tokens = torch.arange(8, device=weight.device).remainder(weight.shape[0]).repeat(2, 1)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    labels = tokens.masked_fill((tokens == 3) | (mask == 0), IGNORE_INDEX)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    try:
        # a router of tokens turns the last bits of another kernel into another choice, which is no matter of the loss
        base = model.disable_adapter() if getattr(model, "routes_tokens", False) else nullcontext()  # type: ignore[operator]
        with evaluating(model), base:
            own = model(**batch).loss
            ours = supervised_loss(model, batch)
    except Exception as error:  # any architecture may fail in its own way: the reason goes to the caller
        return f"a trial with a few tokens failed ({type(error).__name__}: {error})"
    # half precision logits carry 8 (bfloat16) or 11 bits
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    if not torch.isclose(own.float(), ours.float(), rtol=tolerance, atol=tolerance, equal_nan=True):
        return f"on a few tokens the model's own loss is {own.item():.6f} and the chunked loss {ours.item():.6f}"
    return None


class Trial(NamedTuple):
    """What a trial of the chunked loss on a model has shown: it need not be made again."""

    own_loss_reason: str | None
    """What :func:`supports_chunked_loss` has said."""


def _parts(model: nn.Module) -> CausalParts | str:
    """Cut the model before its head, or say why that is not possible."""
    base = inner_model(model)
    name, config = type(base).__name__, getattr(base, "config", None)
    if config is None or not hasattr(base, "base_model") or not hasattr(base, "get_output_embeddings"):
        return f"{name} is not a transformers model"
    if getattr(config, "is_encoder_decoder", False):
        return f"{name} is an encoder-decoder model, whose labels are not shifted"
    if any(getattr(part, "output_router_logits", False) for part in (config, config.get_text_config())):
        return f"{name} adds a router loss (output_router_logits=True)"
    body, head = base.base_model, base.get_output_embeddings()
    if head is None or body is base:
        return f"{name} has no separate body and output head"
    problem = _head_problem(head)
    if "forward" in vars(base) and not (hasattr(base, "_hf_hook") or hasattr(base, AUTOCAST)):
        return f"the forward of {name} is replaced on the object itself, and would not run"
    return problem or CausalParts(base, body, head, _transform(config.get_text_config()))


def _head_problem(head: nn.Module) -> str | None:
    """Why the output head cannot be applied by its weight alone, or None if it can."""
    if _is_gathered_by_itself(head) and isinstance(head, nn.Linear):
        return None
    if type(head) is not nn.Linear:
        return f"the output head is not a plain nn.Linear but {type(head).__module__}.{type(head).__name__}"
    if can_be_gathered(head.weight):
        return None  # FSDP2 puts it together for the length of a call
    if type(head.weight) is not nn.Parameter or type(head.weight.data) is not Tensor:
        return f"the output head's weight is a {type(head.weight.data).__name__}"
    if "forward" in vars(head) or any(
        (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    ):
        return "the output head has hooks, which would not run"
    return None


def _is_gathered_by_itself(head: nn.Module) -> bool:
    """Whether FSDP2 puts the weight together when the head itself is called (``fully_shard(head)``)."""
    return any(kind.__name__ == "FSDPModule" for kind in type(head).__mro__)


def _transform(config: Any) -> LogitTransform:
    """Read scale and softcap of the logits from a model's config."""
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    for name in _DIVISORS:
        scale /= getattr(config, name, None) or 1.0
    softcap = next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)
    return LogitTransform(float(scale), None if softcap is None else float(softcap))


def _next_labels(labels: Tensor) -> Tensor:
    """(batch, tokens) labels moved so that position t holds label t + 1; the last position has none."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _uncompiled(function: Callable[..., tuple[Tensor, int]]) -> Callable[..., tuple[Tensor, int]]:
    """Leave the number of chunks, which differs from batch to batch, to Python: a graph break, not a recompile."""
    return cast(Callable[..., tuple[Tensor, int]], torch.compiler.disable(function))  # type: ignore[no-untyped-call]


@_uncompiled
def head_loss(
    states: HiddenStates, next_labels: Tensor, chunk_tokens: int | None, points: Points = LOG_LIKELIHOOD
) -> tuple[Tensor, int]:
    """Summed loss of the last states against next_labels (batch, tokens), and the number of terms.

    Args:
        points: what is summed over the supervised positions.
    """
    hidden = states.last
    flat_labels = next_labels.reshape(-1).to(hidden.device)
    positions = (flat_labels != IGNORE_INDEX).nonzero().squeeze(1)  # waits for the device: the row count is its size
    if len(positions) == 0:
        return hidden.sum().float() * 0.0, 0  # with a gradient, which is 0
    weight: Tensor = states.head.weight
    bias: Tensor | None = states.head.bias
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)  # once, not once a chunk
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
    if chunk_tokens is None:
        size = weight.element_size() if _in_blocks(weight, weight.requires_grad) else 4
        fitting = max(1, CHUNK_BYTES // (size * weight.shape[0]))
        chunk_tokens = fitting - fitting % ROW_MULTIPLE if fitting > ROW_MULTIPLE else fitting
    rows = filled_up(rows, min(ROW_MULTIPLE, chunk_tokens))
    total = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        rows, weight, bias, flat_labels[positions], states.transform, chunk_tokens, torch.is_grad_enabled(), points
    )
    return cast(Tensor, total), len(positions)


def _in_blocks(weight: Tensor, trained: bool) -> bool:
    """Whether the softmax of a chunk is taken some rows at a time: on a CPU, unless they make a weight gradient too."""
    return weight.device.type == "cpu" and not trained


class _HeadLoss(torch.autograd.Function):
    """Summed loss of transform(rows @ weight.T + bias); the gradients are taken in the forward pass.

    Rows after the last target count for nothing.

    They are those of the *sum*, of order one, and are scaled in the backward pass by what arrives there: fp16 loss
    scaling keeps working, and the division by the token count is plain autograd's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        chunk_tokens: int,
        grad_enabled: bool,
        points: Points = LOG_LIKELIHOOD,
    ) -> Tensor:
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=rows.device)
        grad_rows = torch.empty_like(rows) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None
        with torch.autocast(rows.device.type, enabled=False):
            block = CPU_ROWS if _in_blocks(weight, wanted[1]) else chunk_tokens
            for start in range(0, len(rows), chunk_tokens):
                end = min(start + chunk_tokens, len(rows))
                stored = nn.functional.linear(rows[start:end], weight, bias)
                points.begin(start, end)
                for first in range(start, end, block):
                    part = stored[first - start : first - start + block]
                    gold = targets[first : min(first + block, end)]
                    logits = transform.apply_(part.to(wide))
                    value, grad = points(logits, gold, first, any(wanted))
                    total += value
                    if grad is None:
                        continue
                    grad[len(gold) :] = 0.0
                    grad = transform.gradient_(grad, logits)
                    if grad_weight is not None:
                        grad_weight.addmm_(grad.T, rows[first : first + block].to(wide))
                    if grad_bias is not None:
                        grad_bias += grad.sum(dim=0)
                    part.copy_(grad)
                if grad_rows is not None:
                    torch.mm(stored, weight, out=grad_rows[start:end])
        ctx.save_for_backward(grad_rows, grad_weight, grad_bias)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if grad is None else (grad * grad_output).to(ctx.dtype) for grad in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)
