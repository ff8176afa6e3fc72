"""Statistics of a transformer are those of its weights and data, however it is made to save memory."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from lorafa import LoraConfig, collect_statistics
from toys.language_models import IDS, llama

KINDS = ("gradient", "second_moment", "corda_moment", "principal")
LABELS = IDS.masked_fill(IDS == 0, -100)


def opt(**options: float) -> nn.Module:
    torch.manual_seed(0)
    settings = {"vocab_size": 32, "hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**(settings | sizes | options)))


def statistics(model: nn.Module, *targets: str) -> dict[str, Tensor]:
    """Of two batches, all in one pass that runs backward, as a training step does."""
    targets = targets or ("q_proj", "k_proj", "down_proj", "lm_head")

    def step() -> None:
        for rows in (slice(0, 1), slice(1, 2)):
            model(input_ids=IDS[rows], labels=LABELS[rows]).loss.backward()

    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights="lora_one", init_seed=0)
    found = collect_statistics(model, config, step, also=KINDS, dense=True)
    return {f"{layer} {name}": tensor for layer in found for name, tensor in found[layer].items()}


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return statistics(llama(tie_word_embeddings=True))


@pytest.mark.filterwarnings("ignore:The principal directions")
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("reentrant", [None, True, False], ids=["plain", "reentrant", "non-reentrant"])
def test_checkpointing_and_frozen_weights_change_no_statistic(
    plain: dict[str, Tensor], reentrant: bool | None, frozen: bool
) -> None:
    model = llama(tie_word_embeddings=True).train().requires_grad_(not frozen)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = statistics(model)
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        if not name.endswith((".U", ".Vh", ".components")):  # up to signs, and to rotations where values are equal
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.grad is None and p.requires_grad is not frozen for p in model.parameters())


def test_a_tied_head_has_the_gradient_of_its_use_as_a_head(plain: dict[str, Tensor]) -> None:
    model = llama(tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    tied = llama(tie_word_embeddings=True)
    model.load_state_dict(tied.state_dict())
    for rows in (slice(0, 1), slice(1, 2)):
        (model(input_ids=IDS[rows], labels=LABELS[rows]).loss / 2).backward()
    for name in ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        expected = model.get_submodule(name).weight.grad
        torch.testing.assert_close(plain[f"{name} gradient.dense"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The principal directions")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_dropout_by_a_function_is_off_where_a_block_checkpoints(reentrant: bool) -> None:
    """OPT's blocks call F.dropout(x, p, self.training), and its decoder drops whole layers."""
    settings = {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}
    found = {"plain": opt(), "dropping": opt(**settings), "checkpointed": opt(**settings)}
    found["checkpointed"].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    layer = found["checkpointed"].model.decoder.layers[0]
    calls, checkpoint = [], layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = counting = lambda *args: calls.append(layer.training) or checkpoint(*args)
    values = {name: statistics(model.train(), "q_proj", "fc2") for name, model in found.items()}
    assert calls
    assert layer._gradient_checkpointing_func is counting
    assert all(module.training for module in found["checkpointed"].modules())
    for name in ("dropping", "checkpointed"):
        for key, value in values["plain"].items():
            if not key.endswith((".U", ".Vh", ".components")):
                torch.testing.assert_close(values[name][key], value, rtol=1e-4, atol=1e-6, msg=f"{name} {key}")


ROWS = [{"input_ids": IDS[rows], "labels": LABELS[rows]} for rows in (slice(0, 1), slice(1, 2))]


def inputs_of(model: nn.Module, data: object, *targets: str) -> tuple[dict[str, dict[str, Tensor]], int]:
    """Second moments of inputs, and how many rows of logits a batch had."""
    config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights="lora_null")
    logits = []
    watch = model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output.shape[1]))
    found = collect_statistics(model, config, data)  # type: ignore[arg-type]
    watch.remove()
    assert set(logits) == {logits[0]}
    return found.values_by_layer, logits[0]


def test_logits_that_nobody_reads_are_not_computed() -> None:
    model = llama()

    def run_model() -> None:
        for batch in ROWS:
            assert model(**batch).loss.isfinite()

    spared, rows = inputs_of(model, ROWS, "q_proj", "down_proj")
    whole, all_rows = inputs_of(model, run_model, "q_proj", "down_proj")
    assert (rows, all_rows) == (1, IDS.shape[1])
    assert spared.keys() == whole.keys()
    for layer, tensors in whole.items():
        for name, tensor in tensors.items():
            assert torch.equal(spared[layer][name], tensor)


def test_a_head_that_is_adapted_sees_every_row() -> None:
    found, rows = inputs_of(llama(), ROWS, "q_proj", "lm_head")
    assert rows == IDS.shape[1]
    assert int(found["lm_head"]["exact_moment.tokens"]) == IDS.numel()
