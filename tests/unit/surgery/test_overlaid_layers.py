"""A plan for layers that are not in the model yet: copies that share weights with layers that are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lorafa import LoraConfig
from lorafa.errors import TargetError
from lorafa.surgery.plan import plan
from lorafa.surgery.resolve import resolve
from lorafa.surgery.walk import places, tied_groups

NAMES = [f"layers.{i}.{part}" for i in range(4) for part in ("up", "down")]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 9, bias=False)
        self.embed = nn.Embedding(9, 4)
        self.embed.weight = self.head.weight


def sharing(block: nn.Module) -> nn.Module:
    """A block of other modules with the same parameters."""
    return copy.deepcopy(block, {id(p): p for p in block.parameters()})


@pytest.mark.parametrize("tying", [False, True])
def test_copies_of_layers_get_adapters_of_their_own_and_are_tied_to_nothing(tying: bool) -> None:
    model = Model()
    before = {name: id(module) for name, module in model.named_modules()}
    stacked = nn.ModuleList([*model.layers, sharing(model.layers[0]), sharing(model.layers[1])])
    everything = list(places(model, {"layers": stacked}))
    assert [place.name for place in everything if place.name.endswith(("up", "down"))] == NAMES
    assert [[place.name for place in group] for group in tied_groups(everything)] == [["embed", "head"]]
    targets = ["up", "down", *(["embed"] if tying else [])]
    config = LoraConfig(r=2, target_modules=targets, ensure_weight_tying=tying)
    resolved = resolve(model, config, everything=everything)
    planned = plan(resolved, "default")
    ends = ["embed"] if tying else []
    assert [layer.target.full_name for layer in planned.layers] == [*NAMES, *ends]
    assert [tie.target.name for tie in planned.ties] == (["head"] if tying else [])
    first, second = (next(la for la in planned.layers if la.target.name == f"layers.{i}.up") for i in (0, 2))
    assert torch.equal(first.target.weight(), second.target.weight())
    assert not torch.equal(first.parts.A, second.parts.A)  # random starts go by the name
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_an_overlay_of_no_place_of_the_model_is_refused() -> None:
    with pytest.raises(TargetError, match=r"The model has no place called 'layers\.2' for another module"):
        list(places(Model(), {"layers.2": Block()}))
