"""Two processes with half the batch each take the steps of one process with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lorafa.optimizers import create_lorafa_optimizer, create_lorapro_optimizer
from lorafa.optimizers.pairs import pairs_of
from toys.optimizers import adapted, batch, loss
from toys.processes import leave_group, run_group

MAKERS = {"lora_fa": create_lorafa_optimizer, "lora_pro": create_lorapro_optimizer}


def train(rank: int, optimizer: str, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: torch.nn.Module = adapted()
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    made = MAKERS[optimizer](model, lr=1e-2)
    step_on = DistributedDataParallel(model) if world > 1 else model
    torch.manual_seed(1)
    for _ in range(4):
        x, target = batch()
        made.zero_grad()
        loss(step_on, (x.chunk(world)[rank], target.chunk(world)[rank])).backward()
        made.step()
    torch.save([pair.B.detach() for pair in pairs_of(step_on)], f"{folder}/{optimizer}-{world}-{rank}.pt")
    if world > 1:
        leave_group()


@pytest.mark.parametrize("optimizer", MAKERS)
def test_data_parallel_steps_are_those_of_the_whole_batch(optimizer: str, tmp_path: Path) -> None:
    train(0, optimizer, 1, str(tmp_path))
    run_group(train, optimizer, 2, str(tmp_path))

    def found(world: int, rank: int) -> list[Tensor]:
        loaded: list[Tensor] = torch.load(tmp_path / f"{optimizer}-{world}-{rank}.pt")
        return loaded

    for whole, first, second in zip(found(1, 0), found(2, 0), found(2, 1), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, whole, rtol=1e-10, atol=1e-12)
