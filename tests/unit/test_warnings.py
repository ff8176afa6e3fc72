"""A warning names the line of the user's code that led to it, from however deep inside it comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import PeftModel, get_peft_model, initialize
from lorafa.errors import warn
from lorafa.initializers.lora_one import LoraOneConfig
from toys.calibration import Toy, config, inputs, loss


def falling(model: nn.Module, x: Tensor) -> Tensor:
    """Falls with the size of the step, however large."""
    return loss(model, x) if torch.is_grad_enabled() else -(model(x) - Toy().eval()(x)).square().mean()


def no_statistics() -> PeftModel:
    return get_peft_model(Toy(), config("eva"))


def unused_exclusion() -> PeftModel:
    return get_peft_model(Toy(), config(True, exclude_modules=["nowhere"]))


def gamma_at_the_end() -> PeftModel:
    auto = config("lora_one", init_config=LoraOneConfig(stable_gamma="auto"))
    return initialize(Toy(), auto, inputs(), heldout=inputs(), loss=falling)


@pytest.mark.parametrize("call", [no_statistics, unused_exclusion, gamma_at_the_end])
def test_the_line_is_that_of_the_call(call: Callable[[], Any]) -> None:
    with pytest.warns(UserWarning, match=r"nothing to start from|exclude_modules|the smallest gamma") as caught:
        call()
    first = call.__code__.co_firstlineno
    assert all((one.filename, first < one.lineno <= first + 2) == (__file__, True) for one in caught)


def test_frames_of_torch_in_between_are_passed_over() -> None:
    deep = {"__name__": "lorafa.somewhere", "warn": warn}
    exec("def forward():\n    warn('deep')", deep)
    with pytest.warns(UserWarning, match="deep") as caught:
        torch.no_grad()(deep["forward"])()
    assert caught[0].filename == __file__
