"""Bad input to any start: an error that says why, or the recorded fallback; never a silently different method."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lorafa import collect_statistics, get_peft_model, initialize
from lorafa.backends.int8 import Int8Linear
from lorafa.backends.nf4 import NF4Linear
from lorafa.backends.quantized import QuantizedLinear
from lorafa.calibration import STATISTICS
from lorafa.errors import BackendError, CalibrationError, ConfigError
from toys.adapters import STARTED, STARTS, initializer_of, only_layer, with_adapter
from toys.calibration import Toy, config, inputs, loss
from toys.compare import refused
from toys.layers import IN, Single, base_layer

DRAWN = "both_random"
"""A start that reads of the weight how large it is, and no direction."""
ORTHONORMAL = ("loram", "loram_subtracted")
"""Starts that draw directions at right angles, of which a layer has so many."""
OF_TEACHERS = [start for start in STARTS if initializer_of(start).complete]
"""Starts that read a teacher's files as well (tests/unit/starts/test_of_teacher.py)."""
FROM_DATA = [start for start in STARTS if initializer_of(start).needs and start not in OF_TEACHERS]
FROM_GRADIENTS = [
    start for start in FROM_DATA if any("gradient" in statistic for statistic in initializer_of(start).needs)
]


@pytest.mark.matrix(4)
@pytest.mark.parametrize(("start", "kind"), [(start, kind) for start, variant, kind in STARTED if variant == "lora"])
def test_a_rank_beyond_the_layer_is_refused_or_started_from_in_full(start: bool | str, kind: str) -> None:
    model, rank = Single(base_layer(kind)), 3 * IN + 2
    made = initializer_of(start)
    limited = made.needs or (made.reads_weight and start != DRAWN)  # it has no more directions than the layer
    if limited or start in ORTHONORMAL:
        text = rf"layer.*: .*\b({rank}|{2 * rank})\b.*Lower the rank.*exclude_modules"
        with refused(model, ConfigError, text):
            with_adapter(model, kind, init_lora_weights=start, r=rank)
        return
    adapted = with_adapter(model, kind, init_lora_weights=start, r=rank)
    A, B = only_layer(adapted).factor_A("default"), only_layer(adapted).factor_B("default")
    assert (A.shape[-2], B.shape[-1]) == (rank, rank)
    assert A.abs().max() < 10
    assert B.abs().max() < 10


def broken(model: nn.Module, value: float, read: str) -> Callable[[], None]:
    """A training step whose gradients (or inputs, for a start that reads those) are all ``value``."""

    def step() -> None:
        x = inputs(1)[0]
        if read == "gradient":
            (loss(model, x) * value).backward()  # type: ignore[no-untyped-call]
        else:
            loss(model, torch.full_like(x, value)).backward()  # type: ignore[no-untyped-call]

    return step


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")], ids=["zero", "nan", "inf"])
@pytest.mark.parametrize("start", FROM_DATA)
def test_gradients_and_inputs_with_nothing_in_them_fall_back_and_say_so(start: bool | str, value: float) -> None:
    model, x, settings = Toy(), inputs()[0], config(start, target_modules=["first"])
    reads_gradients = start in FROM_GRADIENTS
    step = broken(model, value, "gradient" if reads_gradients else "input")
    stats = collect_statistics(model, settings, step)
    before = model.eval()(x)
    reason = "(is zero|has 0 singular values)" if value == 0 else "is not finite"
    text = rf"init_lora_weights={start!r} has nothing to start from on 1 of 1 layers.*first \(.* {reason}"
    with pytest.warns(UserWarning, match=text):
        adapted = get_peft_model(model, settings, stats=stats)
    layer = only_layer(adapted)
    assert layer.fallbacks["default"]
    assert layer.factor_A("default").any()
    assert not layer.get_delta_weight("default").any()
    assert torch.equal(adapted(x), before)


@pytest.mark.parametrize("start", FROM_DATA)
def test_no_data_at_all_is_an_error(start: bool | str) -> None:
    model = Toy()
    text = "There was no batch to calibrate with: the data is empty. Pass a dataloader"
    with refused(model, CalibrationError, text):
        initialize(model, config(start), [], loss=loss)


@pytest.mark.parametrize("start", FROM_DATA)
def test_a_step_without_backward_is_an_error_where_gradients_are_read(start: bool | str) -> None:
    model, x = Toy(), inputs()[0]

    def step() -> None:
        model(x)

    if start in FROM_GRADIENTS:
        text = r"No gradient arrived at first, .*none of them called backward\(\).* Call loss\.backward\(\) in the"
        with refused(model, CalibrationError, text):
            initialize(model, config(start), step)
    else:
        assert only_layer(initialize(model, config(start), step)).fallbacks == {}


@pytest.mark.parametrize("start", FROM_DATA)
def test_statistics_of_other_weights_or_another_start_are_refused(start: bool | str) -> None:
    model, other = Toy(), Toy()
    nn.init.ones_(other.last.weight)
    stats = collect_statistics(model, config(start), inputs(), loss=loss)
    text = "collected on another model: 1 of 3 layers are missing or have other weights here: last"
    with refused(other, CalibrationError, text):
        get_peft_model(other, config(start), stats=stats)
    needs = initializer_of(start).needs
    unread = next(name for name in STATISTICS.names() if not any(need.endswith(name) for need in needs))
    reader = next(made for made in FROM_DATA if unread in initializer_of(made).needs)
    text = rf"init_lora_weights={reader!r} needs .*{unread}.* of 'first'; none was given\. Collect these statistics"
    with refused(model, CalibrationError, text):
        get_peft_model(model, config(reader), stats=stats)


class Quantized(nn.Module):
    """Two layers, the first of which is stored in 8 or 4 bits."""

    def __init__(self, kind: type[QuantizedLinear]) -> None:
        super().__init__()
        self.first, self.last = kind(torch.randn(30, 40)), nn.Linear(30, 20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x).relu())
        return y


@pytest.mark.parametrize("kind", [Int8Linear, NF4Linear])
@pytest.mark.parametrize("start", [start for start in STARTS if start not in OF_TEACHERS])
def test_a_quantized_base_is_read_as_the_weight_it_stands_for_or_refused(
    start: bool | str, kind: type[QuantizedLinear]
) -> None:
    """The reference is the same model with that weight stored in float32."""
    model, dense = Quantized(kind), Quantized(kind)
    weight = model.first.dequantize()
    dense.first, dense.last = nn.Linear(40, 30, bias=False), model.last
    dense.first.weight = nn.Parameter(weight)
    settings, data = config(start, target_modules=["first"]), inputs(dtype=torch.float32)
    if initializer_of(start).quantizer is not None:
        text = f"'first' is a {kind.__name__}, quantized already. Put an ordinary adapter on it"
        with refused(model, BackendError, text):
            get_peft_model(model, settings)
        return
    layers = []
    for base in (model, dense):
        given = {"stats": collect_statistics(base, settings, data, loss=loss)} if start in FROM_DATA else {}
        with warnings.catch_warnings(action="error"):
            layers.append(only_layer(get_peft_model(base, settings, **given)))
    products = [layer.factor_B("default") @ layer.factor_A("default") for layer in layers]
    torch.testing.assert_close(products[0], products[1], rtol=1e-3, atol=1e-4)
    assert [type(layer.get_base_layer()) for layer in layers] == [kind, nn.Linear]
