"""Statistics of inputs that two processes saw in part are those of one that saw all."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from lorafa.calibration.base import Measured, Statistic
from lorafa.calibration.moments import CordaMoment, ExactMoment, MomentSketch, SecondMoment
from lorafa.calibration.principal import IncrementalPCA, PCASettings
from toys.calibration import tokens
from toys.processes import leave_group, run_group

IN = 20


KINDS: dict[str, type[Statistic]] = {
    "principal": IncrementalPCA,
    "second_moment": SecondMoment,
    "exact_moment": ExactMoment,
    "corda_moment": CordaMoment,
    "moment_sketch": MomentSketch,
}


def collected(rank: int, folder: Path, world: int) -> None:
    """Two passes over every ``world``-th batch; the last rank of two sees nothing in a third statistic."""
    torch.set_num_threads(1)
    batches = torch.load(folder / "data.pt")[rank::world]
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {}
    for name, kind in KINDS.items():
        for seen in ("all", "first only"):
            statistic = kind(Measured("layer", 8, IN, 10, PCASettings(tau=1.0)))
            passes = 2 if name == "principal" else 1
            for number in range(passes):
                statistic.start_pass(number, {})
                for x in batches if seen == "all" or rank == 0 else []:
                    statistic.update(x, None)
                if world > 1:
                    statistic.reduce()
                statistic.end_pass(number, (2, 2))
            found[name, seen] = statistic.result()
    torch.save(found, folder / f"{world}-{rank}.pt")
    if world > 1:
        leave_group()


def test_two_processes_have_the_values_of_one(tmp_path: Path) -> None:
    torch.save([tokens(n).float() for n in (30, 8, 25, 40)], tmp_path / "data.pt")
    collected(0, tmp_path, 1)
    run_group(collected, tmp_path, 2)
    whole, first, second = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for key, values in whole.items():
        for name, value in values.items():
            assert torch.equal(first[key][name], second[key][name]), (key, name)
            if key[1] == "all" and name not in ("vectors", "components"):
                torch.testing.assert_close(first[key][name], value, rtol=2e-4, atol=2e-4, msg=f"{key} {name}")
    one, two = whole["principal", "all"], first["principal", "all"]
    assert (one["components"] * two["components"]).sum(1).abs()[:10].min() > 0.999
