"""Gradients for starts are those of the model's own loss, however it is computed and padded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, Statistics, collect_statistics, get_eva_state_dict, initialize
from lorafa.errors import CalibrationError
from lorafa.models.rows import ROW_MULTIPLE
from lorafa.starts.gamma import GAMMAS

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
    "no mask": [unmasked(7), unmasked(ROW_MULTIPLE)],
    "padded behind": [rows_of(9, 5, 7)],
    "padded in front": [rows_of(9, 5, 7, left=True)],
    "long": [rows_of(POSITIONS - 1), rows_of(ROW_MULTIPLE + 1)],
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
    beyond = POSITIONS - 1  # there are no positions for the next multiple
    seen = lengths_seen(causal_lm(), [rows_of(n) for n in (3, ROW_MULTIPLE, ROW_MULTIPLE + 1, beyond)])
    assert seen == [ROW_MULTIPLE, ROW_MULTIPLE, 2 * ROW_MULTIPLE, beyond]


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


def test_the_head_itself_may_be_a_target() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights="lora_one", init_seed=0)
    found, expected = (collect_statistics(causal_lm(), config, [rows_of(9)], dense=True, loss=f) for f in (None, own))
    for layer in ("lm_head", "model.layers.1.self_attn.q_proj"):  # the model's own loss is in float32
        torch.testing.assert_close(found[layer]["gradient.S"], expected[layer]["gradient.S"], rtol=1e-4, atol=1e-7)


def test_a_head_that_is_a_target_is_in_the_loss_that_chooses_the_size_of_the_step() -> None:
    auto = LoraConfig(
        r=2, lora_alpha=2000, target_modules=["lm_head"], init_lora_weights="lora_one",
        init_config={"stable_gamma": "auto"},
    )  # fmt: skip
    seen, heldout = [rows_of(9)], [rows_of(9), rows_of(8)]
    losses = {}
    for gamma in GAMMAS:
        model = initialize(causal_lm(), replace(auto, init_config={"stable_gamma": gamma}), seen)
        losses[gamma] = sum(float(own(model, batch)) for batch in heldout)
    best = min(losses, key=losses.__getitem__)
    assert best not in (GAMMAS[0], GAMMAS[-1])
    chosen = initialize(causal_lm(), auto, seen, heldout=heldout)
    assert chosen.peft_config["default"].init_config.stable_gamma == best


def test_a_batch_without_a_label_that_counts() -> None:
    empty = rows_of(6) | {"labels": torch.full((1, 6), -100)}
    with pytest.raises(CalibrationError, match=r"In batch 2 of the data no label counts: all are -100"):
        collected([rows_of(9), empty])
    with pytest.raises(CalibrationError, match=r"None of the 1 batches has a label that counts"):
        collected([empty], weighting="tokens")
    auto = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="lora_one", init_config={"stable_gamma": "auto"})
    with pytest.raises(CalibrationError, match=r"In batch 1 of heldout no label counts"):
        initialize(causal_lm(), auto, [rows_of(9)], heldout=[empty])
    alone, beside = (collected(data, weighting="tokens", dense=True) for data in ([rows_of(9)], [rows_of(9), empty]))
    for layer in alone:
        assert torch.equal(beside[layer]["gradient.S"], alone[layer]["gradient.S"])


def test_shifted_labels_weigh_as_much_as_those_that_are_not() -> None:
    shifted = [batch | {"shift_labels": nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)} for batch in
               (rows_of(9), rows_of(5, 7))]  # fmt: skip
    for batch in shifted:
        del batch["labels"]
    found = collected(shifted, weighting="tokens", dense=True)
    expected = collected([rows_of(9), rows_of(5, 7)], weighting="tokens", dense=True)
    for layer in expected:
        torch.testing.assert_close(found[layer]["gradient.S"], expected[layer]["gradient.S"], rtol=1e-9, atol=1e-13)


def test_every_label_of_a_classifier_counts() -> None:
    settings = causal_lm().config.to_dict() | {"num_labels": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**settings)).double()
    rows = rows_of(6, 6, 6, 6) | {"labels": torch.tensor([0, 1, 1, 0])}
    parts = [{name: value[part] for name, value in rows.items()} for part in (slice(3), slice(3, 4))]
    config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="lora_one", init_seed=0)
    whole, split = (collect_statistics(model, config, d, weighting="tokens", dense=True) for d in ([rows], parts))
    for layer in whole:
        torch.testing.assert_close(split[layer]["gradient.S"], whole[layer]["gradient.S"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "more",
    [{"num_items_in_batch": torch.tensor(1000.0)}, {"position_ids": (torch.arange(9) % 4).unsqueeze(0)}],
    ids=["num_items_in_batch", "position_ids"],
)
def test_what_else_a_batch_says_is_read_by_the_models_own_loss(more: dict[str, Any]) -> None:
    batch = rows_of(9) | more
    found, expected = collected([batch], dense=True), collected([batch], dense=True, loss=lambda m, b: m(**b).loss)
    for layer in expected:
        assert torch.equal(found[layer]["gradient.S"], expected[layer]["gradient.S"])


def test_a_training_step_that_begins_with_train_has_no_dropout_either() -> None:
    model = causal_lm(attention_dropout=0.5)
    config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="lora_one", init_seed=0)

    def step() -> None:
        model.train()
        model(**rows_of(9)).loss.backward()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return own(model.train(), batch)

    for data, given in ((step, None), ([rows_of(9)], loss)):
        first, second = (collect_statistics(model.eval(), config, data, loss=given) for _ in range(2))
        assert not model.training
        for layer in first:
            assert torch.equal(first[layer]["gradient.S"], second[layer]["gradient.S"])


def test_masks_given_by_position_leave_padding_out() -> None:
    batch = rows_of(9, 5)
    config = LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="corda", init_seed=0)
    by_name = {name: value for name, value in batch.items() if name != "labels"}
    for data in ([by_name], [(batch["input_ids"], batch["attention_mask"])]):
        stats = collect_statistics(causal_lm(), config, data)
        assert {int(tensors["corda_moment.tokens"]) for tensors in stats.values()} == {14}


def test_label_of_a_token_classifier_counts_at_the_first_position_too() -> None:
    settings = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = transformers.BertForTokenClassification(transformers.BertConfig(**settings, num_attention_heads=2))
    labels = torch.full((1, 6), -100).index_fill(1, torch.tensor([0]), 1)
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights="lora_one", init_seed=0)
    stats = collect_statistics(model, config, [rows_of(6) | {"labels": labels}], weighting="tokens")
    assert all(bool(tensors["gradient.S"][0] > 0) for tensors in stats.values())


def test_one_label_for_a_row_says_nothing_of_its_tokens() -> None:
    """EVA leaves out tokens without a label; a classifier has labels for whole rows."""
    settings = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**settings, num_attention_heads=2))
    batches = [rows_of(9, 5) | {"labels": torch.tensor([0, 1])} for _ in range(2)]
    adapter = LoraConfig(r=2, target_modules=["query"], init_lora_weights="eva", eva_config={"rho": 1.0, "tau": 1.0})
    stats = collect_statistics(model, adapter, batches)
    without = collect_statistics(model, adapter, [{k: v for k, v in b.items() if k != "labels"} for b in batches])
    for layer in stats:
        assert torch.equal(stats[layer]["principal.tokens"], without[layer]["principal.tokens"])
    assert set(get_eva_state_dict(model, batches, adapter, show_progress_bar=False)) == set(stats)


@pytest.mark.parametrize("start", ["lora_one", "functional", "eva"])
def test_halves_of_batches_that_are_padded_in_some_passes_are_those_of_one_order(start: str) -> None:
    """Rows are padded where gradients alone are read: the same batches look different from pass to pass."""
    batches = [rows_of(n) for n in (9, 14, 32, 7)]
    options: dict[str, Any] = {"passes": 2, "dense": False, "halves": True, "also": ["gradient"]}
    stats = collected(batches, start, **options)
    assert all("gradient.cross" in tensors for tensors in stats.values())
    unlabelled = rows_of(5) | {"labels": torch.full((1, 5), -100)}
    mixed = Shuffled([*batches, unlabelled])
    with pytest.raises(CalibrationError, match="The batches came in another order, or were others"):
        collected(mixed, start, **options, weighting="tokens")  # type: ignore[arg-type]


class Shuffled:
    """Goes over the same batches, each time with the last one first."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        self.batches = [self.batches[-1], *self.batches[:-1]]
        return iter(self.batches)
