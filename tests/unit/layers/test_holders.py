"""What holds the factors of an adapter under PEFT's names."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lorafa.layers.parts import linear_holder


@pytest.mark.parametrize("bias", [False, True])
def test_a_holder_is_the_linear_layer_that_its_constructor_makes(bias: bool) -> None:
    own = nn.Linear(5, 3, bias=bias)
    state = torch.get_rng_state()
    held = linear_holder(own.weight.detach(), own.bias.detach() if bias else None)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(2, 5)
    for one in (held, copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert torch.equal(one(x), own(x))
    assert vars(held).keys() == vars(own).keys()
    assert list(held.state_dict()) == list(own.state_dict())
    assert repr(held) == repr(own)
