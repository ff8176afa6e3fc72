"""Batches that mix adapters, on models of transformers: every row is what it is alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import AdapterError, BackendError
from lorafa.layers.base import LoraLayer
from toys.adapters import train
from toys.compare import close, refused
from toys.language_models import bert, gpt2, llama, mixtral, qwen2_moe, t5

IDS = torch.tensor([[4, 7, 1, 9, 3], [2, 8, 8, 5, 1], [9, 1, 4, 4, 6], [3, 3, 2, 7, 5]])
NAMES = ["a", "b", "__base__", "a"]


def opt() -> nn.Module:
    """A model whose layers get all tokens in one dimension."""
    config = transformers.OPTConfig(
        vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, word_embed_proj_dim=16, dropout=0.0,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (llama, {"target_modules": "all-linear"}),
    "llama, DoRA, token rows": (
        llama,
        {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "trainable_token_indices": [4, 8]},
    ),
    "llama, head and embedding": (llama, {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "llama, copies": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True}),
    "opt": (opt, {"target_modules": "all-linear"}),
    "mixtral, experts": (mixtral, {"target_modules": "all-linear"}),
    "qwen2 moe, experts": (qwen2_moe, {"target_modules": "all-linear"}),
    "bert, classifier": (bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
}


def two(case: str) -> PeftModel:
    make, settings = CASES[case]
    torch.manual_seed(0)
    model = get_peft_model(make().double(), LoraConfig(r=4, **settings), "a")
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=5, **settings))
    model.set_requires_grad("b")
    train(model, 0.2)
    return model.eval()


def each(model: PeftModel, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Each row by itself, with its own adapter."""
    found = []
    for row, name in zip(IDS, NAMES, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                found.append(run(row[None]))
        else:
            model.set_adapter(name)
            found.append(run(row[None]))
    return torch.cat(found)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_each_row_alone(case: str) -> None:
    model = two(case)
    close(model(IDS, adapter_names=NAMES).logits, each(model, lambda ids: model(ids).logits), 1e-9)
    for name in ("a", "b"):
        picked = torch.tensor([i for i, n in enumerate(NAMES) if n == name])
        model.set_adapter(name)
        model.zero_grad()
        model(IDS[picked]).logits.square().sum().backward()
        wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model.set_requires_grad(["a", "b"])
        model(IDS, adapter_names=NAMES).logits.square().sum().backward()
        assert wanted
        for n, p in model.named_parameters():
            if n in wanted:
                close(p.grad, wanted[n], 1e-8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_sees_the_same_rows(reentrant: bool) -> None:
    plain, checkpointed = two("llama"), two("llama")
    found = []
    for model in (plain, checkpointed):
        model.set_requires_grad(["a", "b"])
        model.train()
        if model is checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(IDS, labels=IDS, adapter_names=NAMES).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        close(found[1][name], found[0][name], 1e-9)


@pytest.mark.parametrize("case", ["llama", "llama, DoRA, token rows", "opt", "mixtral, experts", "llama, copies"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generated_tokens_are_those_of_each_row_alone(case: str, options: dict[str, Any]) -> None:
    model = two(case)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **options}
    found = model.generate(input_ids=IDS, adapter_names=NAMES, **settings)
    assert torch.equal(found, each(model, lambda ids: model.generate(input_ids=ids, **settings)))


@pytest.mark.parametrize("beams", [1, 3])
def test_an_encoder_reads_its_rows_once_and_the_decoder_its_beams(beams: int) -> None:
    torch.manual_seed(0)
    settings = {"target_modules": "all-linear"}
    model = get_peft_model(t5().double(), LoraConfig(r=4, **settings), "a")
    model.add_adapter("b", LoraConfig(r=2, **settings))
    model.set_requires_grad("b")
    train(model, 0.2)
    model.eval()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False}
    found = model.generate(input_ids=IDS, adapter_names=NAMES, **options)
    assert torch.equal(found, each(model, lambda ids: model.generate(input_ids=ids, **options)))


def test_a_cache_of_keys_and_values_keeps_the_order_of_the_batch() -> None:
    model = two("llama")
    with torch.no_grad():
        whole = model(IDS, adapter_names=NAMES).logits
        first = model(IDS[:, :3], adapter_names=NAMES, use_cache=True)
        rest = model(IDS[:, 3:], adapter_names=NAMES, past_key_values=first.past_key_values).logits
    close(rest, whole[:, 3:], 1e-9)


def test_compiled_models_mix_without_a_break() -> None:
    model = two("llama")
    expected = model(IDS, adapter_names=NAMES).logits
    torch._dynamo.reset()
    model.get_base_model().model.layers[0].mlp.compile(backend="eager", fullgraph=True)
    try:
        close(model(IDS, adapter_names=NAMES).logits, expected, 1e-9)
    finally:
        torch._dynamo.reset()


def test_disabled_adapters_count_in_no_row() -> None:
    model = two("llama")
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(IDS, adapter_names=NAMES).logits, model(IDS).logits)


def test_the_active_adapter_counts_again_after_a_mixed_call() -> None:
    model = two("llama")
    model.set_adapter("b")
    expected = model(IDS).logits
    model(IDS, adapter_names=NAMES)
    assert torch.equal(model(IDS).logits, expected)
    inside = model.get_base_model()(IDS).logits  # not through the door: no rows are known there
    assert torch.equal(inside, expected)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["a", "b", "c", "a"], r"the model has no adapter 'c'.*It has: a, b. '__base__' stands for the base alone"),
        (["a", "b"], r"adapter_names has 2 names, and the batch has 4 rows"),
        ("a", r"adapter_names is a list with the name of an adapter for each row"),
        ({"a": 1}, r"adapter_names is a list"),
        (["a", 3, "b", "a"], r"adapter_names has 3 .int. for a row"),
        (["a", None, "b", "a"], r"adapter_names has None .* for a row"),
    ],
)
def test_names_that_fit_no_rows_are_refused(names: Any, text: str) -> None:
    model = two("llama")
    for call in (model, model.generate):
        with refused(model, AdapterError, text):
            call(input_ids=IDS, adapter_names=names)


def test_merged_adapters_and_copies_that_want_one_place_are_refused() -> None:
    model = two("llama, copies")
    with refused(model, AdapterError, "'a' and 'b' cannot count together: both have a copy"):
        model(IDS, adapter_names=["a", ["a", "b"], "a", "b"])
    model.merge_adapter(["a"])
    with pytest.raises(AdapterError, match="merged into the base weights"):
        model(IDS, adapter_names=NAMES)


class Pooled(nn.Module):
    """Adapts a layer that sees other rows than the batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.cat([x, x[:1]]))
        return y


class Mixture(nn.Module):
    """Lists of experts inside a list of layers, which get some of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0][1](x[[2, 0, 1]])  # type: ignore[index]
        return y


class NamedExperts(nn.Module):
    """Experts that have names, as those of NLLB, and get all tokens in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{i}": nn.ModuleDict({"fc1": nn.Linear(8, 8)}) for i in range(2)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts["expert_1"]["fc1"](x[[2, 0, 1]])  # type: ignore[index]
        return y


@pytest.mark.parametrize(
    ("model", "targets"),
    [(Pooled(), ["layer"]), (Mixture(), ["layers.0.1"]), (NamedExperts(), ["experts.expert_1.fc1"])],
)
def test_layers_that_do_not_see_the_rows_of_the_batch_are_refused_by_name(model: nn.Module, targets: list[str]) -> None:
    adapted = get_peft_model(model, LoraConfig(target_modules=targets), "a")
    with refused(adapted, BackendError, rf"'{targets[0]}' gets \(.*3 rows.*exclude_modules"):
        adapted(torch.randn(3, 8), adapter_names=["a", "__base__", "a"])


class Products(TorchDispatchMode):
    """Counts the matrix products that PyTorch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func._overloadpacket) in {f"aten.{name}" for name in ("mm", "addmm", "addmm_", "bmm")}
        return func(*args, **kwargs or {})


STEPS = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0, "output_logits": True}


def stepped(model: PeftModel, ids: Tensor, **options: Any) -> Tensor:
    """The logits of each step of ``generate``, (rows, steps, vocabulary)."""
    out = model.generate(input_ids=ids, return_dict_in_generate=True, **STEPS, **options)
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("case", ["llama", "gpt2", "opt", "mixtral, experts"])
def test_every_step_of_a_long_answer_is_that_of_each_row_alone(case: str) -> None:
    model = two(case)
    mixed = stepped(model, IDS, adapter_names=NAMES)
    close(mixed, each(model, lambda ids: stepped(model, ids)), 1e-9)


def test_later_steps_take_one_product_for_the_adapters_of_all_rows() -> None:
    model = two("llama")
    linears = sum(isinstance(module, LoraLayer) for module in model.modules())
    counts: list[int] = []

    def started(module: nn.Module, args: Any, kwargs: Any) -> None:
        counts.append(counter.count)

    handle = model.get_base_model().register_forward_pre_hook(started, with_kwargs=True)
    with Products() as counter:
        model.generate(input_ids=IDS, adapter_names=NAMES, **STEPS)
    handle.remove()
    taken = [after - before for before, after in itertools.pairwise([*counts, counter.count])]
    assert taken[0] - taken[-1] == 2 * linears, "A and B of two adapters in the first pass, of both at once later"


@pytest.mark.parametrize("change", ["values", "scaling", "tensor"])
def test_what_changes_while_an_answer_is_written_counts_from_the_next_step_on(change: str) -> None:
    model, other = two("llama"), two("llama")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    steps = 0

    def changed(ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 4:
            for layer in layers:
                one = layer.adapters["a"]
                if change == "values":
                    one.B.mul_(-1)
                elif change == "tensor":
                    one.B.data = -one.B.data
                else:
                    one.scaling = -one.scaling
        return torch.zeros(len(ids), dtype=torch.bool)

    found = stepped(model, IDS, adapter_names=NAMES, stopping_criteria=[changed])
    before = stepped(other, IDS, adapter_names=NAMES)
    close(found[:, :4], before[:, :4], 1e-9)
    assert not torch.allclose(found[0, 4], before[0, 4])
    torch.testing.assert_close(found[2], before[2])
