"""Collecting statistics: what reaches them, and that nothing stays behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorafa.calibration.base import Measured, Statistic
from lorafa.calibration.batches import Asked, Batches
from lorafa.calibration.collect import collect
from toys.calibration import LAYERS, Toy, collected, gradient_matrix, gradients, inputs, loss, over, statistics


class Rows(Statistic):
    """Keeps every row it is given."""

    kept = "all"

    def __init__(self, layer: Measured) -> None:
        super().__init__(layer)
        self.seen: list[Tensor] = []

    @property
    def tokens(self) -> Any:
        return self.kept

    def update(self, x: Tensor, d: Tensor | None) -> None:
        self.seen.append(x)

    def result(self) -> dict[str, Tensor]:
        return {"rows": torch.cat(self.seen)}


class Attended(Rows):
    kept = "attended"


class Labelled(Rows):
    kept = "labelled"


class Shared(Rows):
    @property
    def shares_input(self) -> bool:
        return True


def snapshot(model: nn.Module) -> list[object]:
    """Everything calibration touches."""
    return [
        [(p.requires_grad, p.grad is None, p.detach().clone().tolist()) for p in model.parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    ]


def test_nothing_stays_on_the_model() -> None:
    model = Toy()
    model.first.weight.requires_grad_(False)
    model.last.eval()
    before = snapshot(model)
    collected(model, inputs())
    assert snapshot(model) == before


def test_nothing_stays_on_the_model_after_an_error_in_the_loss() -> None:
    model, data = Toy(), inputs()
    before = snapshot(model)
    data[1] = data[1][..., :7]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        collected(model, data)
    assert snapshot(model) == before


def test_weights_get_no_gradient_and_dropout_is_off() -> None:
    model, data, modes = Toy(), inputs(), []
    named = statistics(model)

    def run(asked):  # type: ignore[no-untyped-def]
        for x in data:
            loss(model, x).backward()
            modes.append([p.grad for p in model.parameters()] + [model.drop.training])
            yield None

    collect(model, {name: model.get_submodule(name) for name in LAYERS}, named, Batches(run, by_call=True))
    assert modes == [[None] * 5 + [False]] * len(data)


def test_the_own_gradients_of_a_training_loop_are_left_alone() -> None:
    model, data = Toy(), inputs()
    loss(model, data[0]).backward()
    kept = [parameter.grad.clone() for parameter in model.parameters()]
    collected(model, data)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), kept, strict=True))


class Blocks(nn.Module):
    """Layers inside checkpointed blocks, after an embedding as in a transformer."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8).double()
        self.first, self.second = Block(), Block()
        self.reentrant = reentrant
        for module in (self.first, self.second):
            module.gradient_checkpointing = reentrant is not None  # type: ignore[assignment]

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in (self.first, self.second):
            if block.gradient_checkpointing and block.training:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            else:
                x = block(x)
        y: Tensor = x.sin().mean()
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32).double(), nn.Linear(32, 8).double()
        self.live: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


def of_blocks(reentrant: bool | None, training: bool = True) -> dict[str, Tensor]:
    model = Blocks(reentrant).train(training)
    names = ("first.up", "first.down", "second.up", "second.down")
    ids = torch.arange(10).view(2, 5)

    def run(asked):  # type: ignore[no-untyped-def]
        model(ids).backward()
        yield None

    named = statistics(model, layers=names, dense=True)
    values = collect(model, {name: model.get_submodule(name) for name in names}, named, Batches(run, by_call=True))
    return {name: value["gradient.dense"] for name, value in values.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool, training: bool) -> None:
    plain, checkpointed = of_blocks(None), of_blocks(reentrant, training)
    for name, G in plain.items():
        torch.testing.assert_close(checkpointed[name], G, rtol=1e-12, atol=1e-15)


def test_checkpointing_keeps_no_input_of_the_layers() -> None:
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    model, ids = Blocks(False), torch.arange(10).view(2, 5)
    named = statistics(model, layers=("first.down",), dense=True)

    def run(asked):  # type: ignore[no-untyped-def]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = model(ids)
        value.backward()
        yield None

    collect(model, {"first.down": model.first.down}, named, Batches(run, by_call=True))
    assert (2, 5, 32) not in kept


def test_tied_and_repeated_calls_add_up() -> None:
    """``first`` is called twice in a forward pass: autograd's gradient has both."""
    model, data = Toy(), inputs()
    found = collected(model, data, layers=("first",), dense=True)["first"]
    torch.testing.assert_close(gradient_matrix(found), gradients(model, data)["first"], rtol=1e-10, atol=1e-14)


def masked(kind: type[Rows], **masks: Tensor) -> Tensor:
    model, x = Toy(), inputs(1)[0]
    named = statistics(model, 2, kind, "rows", ("second",))

    def run(asked):  # type: ignore[no-untyped-def]
        model(x, **masks)
        yield None

    return collect(model, {"second": model.second}, named, Batches(run, by_call=True))["second"]["rows.rows"]


def test_rows_that_do_not_count_are_left_out() -> None:
    x = inputs(1)[0]
    attention = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, 3, 3, 3, 3, -100], [2, -100, -100, 2, 2, 2]])
    both = {"attention_mask": attention, "labels": labels}
    assert torch.equal(masked(Rows, **both), x.flatten(0, 1))
    assert torch.equal(masked(Attended, **both), x[attention.bool()])
    assert torch.equal(masked(Labelled, **both), x[attention.bool() & (labels != -100)])
    assert torch.equal(masked(Attended), x.flatten(0, 1))


class Fed(Statistic):
    """How many rows it is given, and the sum of d x^T over them."""

    reads_gradient = True

    def __init__(self, layer: Measured) -> None:
        super().__init__(layer)
        self.counts: list[int] = []
        self.G = torch.zeros(layer.out, layer.in_, dtype=torch.float64)

    def update(self, x: Tensor, d: Tensor | None) -> None:
        self.counts.append(len(x))
        self.G += d.mT @ x

    def result(self) -> dict[str, Tensor]:
        return {"G": self.G, "counts": torch.tensor(self.counts)}


def test_on_a_cpu_gradients_come_with_zero_rows_up_to_few_sizes() -> None:
    model, data = Toy(), [torch.randn(1, rows, inputs()[0].shape[-1], dtype=torch.float64) for rows in (1, 31, 32, 33)]
    named = statistics(model, 2, Fed, "fed", ("first",))
    found = collect(model, {"first": model.first}, named, over(model, data))["first"]
    assert set(found["fed.counts"].tolist()) == {32, 64}
    total = sum(gradients(model, [x])["first"] for x in data)
    torch.testing.assert_close(found["fed.G"], total, rtol=1e-12, atol=1e-14)


def test_forward_statistics_need_no_graph_and_allow_one() -> None:
    model, x = Toy(), inputs(1)[0]
    named, graphs = statistics(model, 2, Rows, "rows"), []

    def run(asked):  # type: ignore[no-untyped-def]
        with torch.set_grad_enabled(asked.gradients):
            graphs.append(model(x).requires_grad)
        yield None

    collect(model, {name: model.get_submodule(name) for name in LAYERS}, named, Batches(run, by_call=True))
    assert graphs == [False]
    named = statistics(model, 2, Rows, "rows")
    collect(model, {name: model.get_submodule(name) for name in LAYERS}, named, over(model, [x]))  # calls backward


class Gated(nn.Module):
    """Three layers that are given one tensor, ``often`` times; ``third`` only where ``reach`` says so."""

    def __init__(self, often: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(4, 4).double() for _ in range(3))
        self.often = often

    def forward(self, x: Tensor, reach: bool = True, aside: Tensor | None = None) -> Tensor:
        for _ in range(self.often):
            y = self.first(x) + self.second(x)
            x = y + self.third(x) if reach else y
        return x if aside is None else x + self.first(aside).sum()


def rows_of_gated(model: Gated, batches: list[dict[str, Any]]) -> tuple[dict[str, Tensor], int]:
    """Of each layer, and the number of passes that took."""
    layers, passes = ("first", "second", "third"), []

    def run(asked: Asked) -> Any:
        passes.append(asked.gradients)
        for batch in batches:
            model(**batch)
            yield None

    named = statistics(model, 2, Shared, "rows", layers)
    found = collect(model, {name: model.get_submodule(name) for name in layers}, named, Batches(run, by_call=True))
    return {name: found[name]["rows.rows"] for name in layers}, len(passes)


@pytest.mark.parametrize("often", [1, 3])
def test_layers_with_one_input_share_what_depends_on_it_alone(often: int) -> None:
    data = inputs(3, in_=4)
    found, passes = rows_of_gated(Gated(often), [{"x": x} for x in data])
    assert found["first"] is found["second"] is found["third"] or len({t.data_ptr() for t in found.values()}) == 1
    assert passes == 1
    assert len(found["first"]) == 3 * 12 * often


@pytest.mark.parametrize(
    ("reached", "passes"), [((True, True, False), 2), ((True, False, True), 2), ((False, True, True), 1)]
)
def test_a_layer_that_some_batches_do_not_reach_has_the_rows_of_the_others(
    reached: tuple[bool, ...], passes: int
) -> None:
    data = inputs(3, in_=4)
    found, taken = rows_of_gated(Gated(), [{"x": x, "reach": reach} for x, reach in zip(data, reached, strict=True)])
    assert torch.equal(found["first"], torch.cat([x.flatten(0, 1) for x in data]))
    kept = [x.flatten(0, 1) for x, reach in zip(data, reached, strict=True) if reach]
    assert torch.equal(found["third"], torch.cat(kept))
    assert taken == passes


@pytest.mark.parametrize("where", [0, 1])
def test_a_layer_that_is_called_once_more_keeps_the_further_rows_to_itself(where: int) -> None:
    data, aside = inputs(2, in_=4), torch.ones(3, 4, dtype=torch.float64)
    batches: list[dict[str, Any]] = [{"x": x} for x in data]
    batches[where]["aside"] = aside
    found, _ = rows_of_gated(Gated(), batches)
    rows = [x.flatten(0, 1) for x in data]
    assert torch.equal(found["second"], torch.cat(rows))
    assert torch.equal(found["third"], torch.cat(rows))
    rows.insert(where + 1, aside)
    assert torch.equal(found["first"], torch.cat(rows))


def test_the_model_is_bit_identical_afterwards() -> None:
    model, data = Toy(dtype=torch.bfloat16), inputs(dtype=torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    outputs = model.eval()(data[0])
    collected(model, data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(data[0]), outputs)


def test_the_layer_of_the_largest_rank_is_not_served_by_one_of_a_smaller() -> None:
    model, data = Toy(), inputs()
    named = statistics(model, 2, Shared, "rows", ("first",)) | statistics(model, 5, Shared, "rows", ("second",))
    collect(model, {name: model.get_submodule(name) for name in named}, named, over(model, data))
    assert named["second"]["rows"].seen  # type: ignore[attr-defined]


def test_layers_are_compared_after_every_batch_and_every_pass() -> None:
    compared: list[list[str]] = []

    class Compared(Rows):
        @classmethod
        def compare(cls, layers: Any) -> None:
            compared.append([layer.name for layer, _ in layers])

    model, data = Toy(), inputs(3)
    named = statistics(model, 2, Compared, "rows")
    collect(model, {name: model.get_submodule(name) for name in named}, named, over(model, data))
    assert compared == [list(LAYERS)] * 4
