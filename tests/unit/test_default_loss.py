"""Gradients for starts are those of the model's own loss, however it is computed and padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, Statistics, collect_statistics
from lorafa.calibration.batches import LENGTHS
from lorafa.data.chat import Sample
from lorafa.data.collate import Collator
from lorafa.train.init_config import InitConfig, start_fields
from lorafa.train.starts import start_adapter

transformers = pytest.importorskip("transformers")
TARGETS = ["q_proj", "down_proj"]
POSITIONS = 100
Batch = dict[str, Tensor]


def causal_lm(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": POSITIONS}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | heads | changes)))
    return model.double()


def rows_of(*lengths: int, left: bool = False) -> Batch:
    """Rows of these lengths, padded together; a third of each is not trained on."""
    generator, longest = torch.Generator().manual_seed(sum(lengths)), max(lengths)
    ids = torch.randint(1, 48, (len(lengths), longest), generator=generator)
    place = torch.arange(longest).expand_as(ids)
    place = place.flip(1) if left else place
    mask = place < torch.tensor(lengths).unsqueeze(1)
    prompt = torch.arange(longest) < longest // 3
    labels = ids.masked_fill(~mask | prompt, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def unmasked(*lengths: int) -> Batch:
    return {name: value for name, value in rows_of(*lengths).items() if name != "attention_mask"}


def own(model: nn.Module, batch: Batch) -> Tensor:
    """The loss by its definition, in float64 (models of transformers compute it in float32)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def collected(batches: list[Batch], start: str = "lora_one", **options: Any) -> Statistics:
    config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=start, init_seed=0)
    return collect_statistics(causal_lm(), config, batches, **options)


BATCHES = {
    "one row": [rows_of(7), rows_of(30)],
    "no mask": [unmasked(7), unmasked(LENGTHS)],
    "padded behind": [rows_of(9, 5, 7)],
    "padded in front": [rows_of(9, 5, 7, left=True)],
    "long": [rows_of(POSITIONS - 1), rows_of(LENGTHS + 1)],
    "positions given": [rows_of(8) | {"position_ids": torch.arange(8).unsqueeze(0)}],
}


@pytest.mark.parametrize("weighting", ["batches", "tokens"])
@pytest.mark.parametrize("name", list(BATCHES))
def test_gradients_are_those_of_the_own_loss(name: str, weighting: str) -> None:
    found = collected(BATCHES[name], dense=True, weighting=weighting)
    expected = collected(BATCHES[name], dense=True, weighting=weighting, loss=own)
    for layer in expected:
        for key, value in expected[layer].items():
            torch.testing.assert_close(found[layer][key], value, rtol=1e-9, atol=1e-13)


def lengths_seen(model: Any, batches: list[Batch]) -> list[int]:
    seen: list[int] = []
    embeddings = model.get_input_embeddings()
    config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="lora_one", init_seed=0)
    hook = embeddings.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    collect_statistics(model, config, batches)
    hook.remove()
    return seen[-len(batches) :]


def test_a_cpu_meets_few_lengths_and_none_beyond_the_positions_of_the_model() -> None:
    assert lengths_seen(causal_lm(), [rows_of(n) for n in (3, 40, LENGTHS, LENGTHS + 1)]) == [
        *(LENGTHS, LENGTHS, LENGTHS),
        LENGTHS + 1,  # the next multiple is beyond what the model has positions for
    ]


class Doubled(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Its loss is not that of its logits alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.loss = None if output.loss is None else 2 * output.loss
        return output


def test_a_loss_of_the_models_own_making_is_computed_by_the_model_on_the_batch_as_it_is() -> None:
    plain = causal_lm()
    model = Doubled(plain.config).double()
    model.load_state_dict(plain.state_dict())
    assert lengths_seen(model, [rows_of(3), rows_of(40)]) == [3, 40]
    config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="lora_one", init_seed=0)
    doubled, once = (collect_statistics(each, config, [rows_of(9)], dense=True) for each in (model, plain))
    for layer in once:
        torch.testing.assert_close(doubled[layer]["gradient.S"], 2 * once[layer]["gradient.S"])


@pytest.mark.parametrize("left", [False, True], ids=["behind", "in front"])
def test_moments_beside_gradients_leave_padding_out(left: bool) -> None:
    together, alone = rows_of(9, 5, left=left), [rows_of(9), rows_of(5)]
    for row, length, single in zip((0, 1), (9, 5), alone, strict=True):
        place = slice(-length, None) if left else slice(length)
        single.update({name: value[row : row + 1, place] for name, value in together.items()})
    found = collected([together], also=["second_moment"])
    expected = collected(alone, start="corda", also=["second_moment"])
    for layer in expected:
        assert found[layer]["second_moment.tokens"] == 14
        torch.testing.assert_close(found[layer]["second_moment.C"], expected[layer]["second_moment.C"])


def test_a_run_on_a_model_whose_loss_is_its_own() -> None:
    model = causal_lm().float()
    model.lm_head.register_forward_hook(lambda module, args, output: 3 * output)
    init = InitConfig(mode="lora_one", iters=2, stable_gamma="auto")
    adapter = LoraConfig(r=2, target_modules=TARGETS, init_seed=0, **start_fields(init))
    rows = [Sample([1, 2, n, 4], [-100, 2, n, 4]) for n in range(3, 20)]
    assert start_adapter(model, adapter, init, rows, Collator(0)).record["stable_gamma"] > 0
