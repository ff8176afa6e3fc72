"""Two processes under torch's FSDP take the steps of one, on layers whose adapter acts through the weight too.

The first FSDP keeps parameters as views of a flat one, which are plain attributes while a module runs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorafa import LoraConfig, check_gradients, get_peft_model
from lorafa.errors import BackendError
from toys.adapters import train as move
from toys.processes import leave_group, run_group

DIM = 4


class Experts(nn.Module):
    """The mean of two experts with stacked weights, and a matrix for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 6, DIM) / 4), nn.Parameter(torch.randn(2, DIM, 6) / 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("ehd,bld->eblh", self.up, x).tanh()
        return torch.einsum("edh,eblh->bld", self.down, hidden) / 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.experts, self.linear = Experts(), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.linear(self.experts(x)).tanh()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Block(), Block(), nn.Linear(DIM, 3)
        self.encoder = nn.TransformerEncoderLayer(DIM, 2, 6, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.second(self.first(x))))


def adapted() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(
        r=2,
        target_modules=["attention", "self_attn", "linear", "linear1"],
        target_parameters=["experts.up", "experts.down"],
    )
    model = get_peft_model(Model(), config)
    move(model)
    return model


def batch() -> Tensor:
    return torch.randn(4, 3, DIM, generator=torch.Generator().manual_seed(1))


def steps(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        check_gradients(model)
        optimizer.step()


def evaluated(model: nn.Module, x: Tensor) -> list[Tensor]:
    """In training mode, and in evaluation, where torch's encoder takes a kernel of its own."""
    with torch.no_grad():
        return [model.train()(x), model.eval()(x)]


def wrapped(model: nn.Module, wrapping: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    if wrapping == "FSDP2":
        mesh = init_device_mesh("cpu", (2,))
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    units: dict[str, Any] = {"whole": None, "blocks": {Block}, "base layers": {nn.MultiheadAttention}}
    policy = None if units[wrapping] is None else ModuleWrapPolicy(units[wrapping])
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def work(rank: int, wrapping: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = wrapped(adapted(), wrapping)
    try:
        steps(model, batch().chunk(2)[rank])
        found: Any = evaluated(model, batch())
    except BackendError as error:
        found = str(error)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    leave_group()


def run(wrapping: str, folder: Path) -> Any:
    run_group(work, wrapping, str(folder))
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("wrapping", ["whole", "blocks", "FSDP2"])
def test_adapters_on_weights_act_and_train_as_in_one_process(wrapping: str, tmp_path: Path) -> None:
    single = adapted()
    untrained = evaluated(copy.deepcopy(single), batch())
    steps(single, batch())
    for found, expected, before in zip(run(wrapping, tmp_path), evaluated(single, batch()), untrained, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found, before, rtol=1e-3)


def test_base_layer_that_is_wrapped_by_itself_is_refused(tmp_path: Path) -> None:
    """Its weight is not there when the adapter reads it."""
    message = run("base layers", tmp_path)
    assert message.startswith("No back end knows FullyShardedDataParallel, which stands where the base layer was.")
    assert message.endswith("wrap whole blocks (auto_wrap_policy), no base layers, or use FSDP2 (fully_shard).")
