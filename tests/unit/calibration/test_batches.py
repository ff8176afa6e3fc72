"""The data side of collecting: what is shown of it, and what a cache tells apart."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, collect_statistics
from lorafa.calibration.batches import digest_of
from lorafa.errors import CalibrationError
from toys.calibration import LAYERS, Toy, inputs, loss

rich = pytest.importorskip("rich")
Console = pytest.importorskip("rich.console").Console
CONFIG = LoraConfig(r=2, target_modules=list(LAYERS), init_lora_weights="lora_one", init_seed=0)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal is sent."""
    sent = io.StringIO()
    monkeypatch.setattr(rich, "_console", Console(file=sent, force_terminal=True, width=80))
    return sent


def assert_nothing_is_left(sent: str) -> None:
    """After the last erased line nothing is printed, and the cursor is back."""
    assert "Collecting statistics" in sent
    assert "Collecting" not in sent.rpartition("\x1b[2K")[2]
    assert sent.rpartition("\x1b[?25h")[1]
    assert "\x1b[?25l" not in sent.rpartition("\x1b[?25h")[2]


def test_progress_is_shown_and_leaves_nothing(terminal: io.StringIO) -> None:
    silent = collect_statistics(Toy(), CONFIG, inputs(), loss=loss)
    assert terminal.getvalue() == ""
    shown = collect_statistics(Toy(), CONFIG, inputs(), loss=loss, progress=True)
    assert_nothing_is_left(terminal.getvalue())
    for name in LAYERS:
        assert torch.equal(shown[name]["gradient.S"], silent[name]["gradient.S"])


def test_progress_leaves_nothing_after_an_error(terminal: io.StringIO) -> None:
    def failing(model: nn.Module, x: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        collect_statistics(Toy(), CONFIG, inputs(), loss=failing, progress=True)
    assert_nothing_is_left(terminal.getvalue())


class Scaled:
    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def __call__(self, value: float) -> float:
        return self.factor * value


def outer(number: int) -> Any:
    return [lambda: number + 1, lambda: number + 2, lambda: max(number, 1), lambda: min(number, 1)]


def test_a_digest_tells_functions_apart_by_their_name_and_code() -> None:
    functions = [*outer(1), outer, Scaled(), functools.partial(outer, 1), max, torch.relu, None]
    assert len({digest_of(one) for one in functions}) == len(functions) - 1  # partial is not told from its function
    for one, same in zip(outer(1), outer(2), strict=True):  # nor what a function reads from around it
        assert digest_of(one) == digest_of(same)
    assert digest_of(Scaled(1)) == digest_of(Scaled(2))


def test_a_digest_sees_a_function_through_its_decorators() -> None:
    decorated = [torch.no_grad()(one) for one in outer(1)]
    assert len({digest_of(one) for one in decorated}) == len(decorated)


def test_a_digest_tells_data_apart_by_shape_dtype_and_bytes() -> None:
    x = torch.arange(6.0)
    nested = [[x, x], [[x], x], [[x, x]]]
    data = [x, x.view(2, 3), x.int(), x + 1, {"x": x}, {"y": x}, *nested, "x", 1, None, {1, 2}]
    long = torch.arange(2000.0)  # an array's text leaves out its middle
    data += [x.numpy(), long.numpy(), (long + (long == 1000)).numpy()]
    assert len({digest_of(one) for one in data}) == len(data)
    assert digest_of([x, {"x": x}]) == digest_of(iter([x.clone(), {"x": x.clone()}]))


def test_parts_of_data_are_told_apart() -> None:
    @dataclasses.dataclass
    class Batch:
        ids: Tensor

    pairs = [
        ([[1, 23]], [[12, 3]]),
        ({"a": "b", "c": "d"}, {"a": "bc", "": "d"}),
        ([Batch(torch.zeros(2000))], [Batch(torch.zeros(2000).index_fill(0, torch.tensor([1000]), 1.0))]),
    ]
    for one, other in pairs:
        assert digest_of(one) != digest_of(other)
        assert digest_of(one) == digest_of(copy.deepcopy(one))


class Pair(NamedTuple):
    x: Tensor
    scale: float


def test_batches_may_be_named_tuples() -> None:
    batches = [Pair(x, 2.0) for x in inputs()]
    found = collect_statistics(Toy(), CONFIG, batches, loss=lambda model, pair: pair.scale * loss(model, pair.x))
    once = collect_statistics(Toy(), CONFIG, inputs(), loss=loss)
    for name in LAYERS:
        torch.testing.assert_close(found[name]["gradient.S"], 2 * once[name]["gradient.S"])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take notes since Python 3.11")
def test_what_fails_on_a_batch_names_it() -> None:
    bad = [*inputs(2), torch.zeros(2, 3)]
    for start in ("lora_one", "corda"):
        config = LoraConfig(r=2, target_modules=list(LAYERS), init_lora_weights=start, init_seed=0)
        with pytest.raises(RuntimeError) as raised:
            collect_statistics(Toy(), config, bad, loss=loss)
        assert raised.value.__notes__ == ["Raised on batch 3 of the data: a tensor (2, 3)."]


def test_a_function_that_returns_a_generator_has_not_run() -> None:
    def batches() -> Iterator[Tensor]:
        yield from inputs()

    with pytest.raises(CalibrationError, match=r"returned an iterator, and none of its code has run.*list\(function"):
        collect_statistics(Toy(), CONFIG, batches)
