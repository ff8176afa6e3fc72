"""The benchmark over ranks: what it counts is what the shapes say."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import lorafa.models.load
from toys.language_models import llama
from toys.places import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "bench_ranks", raising=False)
    monkeypatch.setattr(lorafa.models.load, "load_model", lambda *names, **settings: (llama(), None))
    import bench_ranks

    return bench_ranks


@pytest.mark.parametrize("library", ["lorafa", "peft"])
def test_lora_fa_trains_and_keeps_state_for_B_alone_and_keeps_fewer_bytes(bench: Any, library: str) -> None:
    steps = {method: bench.Step(library, method, rank=4, rows=2, length=6) for method in (bench.LORA, bench.LORA_FA)}
    shapes = [layer.weight.shape for layer in linears(llama())]
    A, B = (4 * sum(shape[at] for shape in shapes) for at in (1, 0))
    for method, count in ((bench.LORA, A + B), (bench.LORA_FA, B)):
        step = steps[method]
        assert step.parameters() == count
        assert step.step() > 0
        counters = step.state() - 2 * 4 * count
        assert 0 <= counters <= 4 * 2 * len(shapes)
    assert 0 < steps[bench.LORA_FA].kept() < steps[bench.LORA].kept()


def linears(model: Any) -> list[Any]:
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def test_kept_bytes_grow_by_what_the_rank_adds(bench: Any) -> None:
    """Of a layer x A^T is kept, a number a token and rank, whether A is trained or not."""
    for method in (bench.LORA, bench.LORA_FA):
        kept = [bench.Step("lorafa", method, rank=rank, rows=2, length=6).kept() for rank in (2, 4, 8)]
        assert kept[2] - kept[1] == 2 * (kept[1] - kept[0]) > 0


@pytest.mark.parametrize("option", ["ranks", "rows", "length", "repeats", "threads"])
def test_counts_are_at_least_one(bench: Any, capsys: Any, option: str) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.read_arguments([f"--{option}", "0"])
    assert stop.value.code == 2
    assert f"argument --{option}: must be an integer >= 1, found '0'" in capsys.readouterr().err


def test_the_table_has_whole_parameters_and_shares(bench: Any) -> None:
    one = {"parameters": 2442240, "state_mib": 18.6, "kept_mib": 1082.0, "above_mib": 9.0, "peak_mib": 9.0}
    other = {"parameters": 1221120, "state_mib": 9.3, "kept_mib": 541.0, "above_mib": 9.0, "peak_mib": 9.0}
    table = bench.table({8: {bench.LORA: one | {"seconds": 2.0}, bench.LORA_FA: other | {"seconds": 1.5}}})
    assert table.splitlines()[-1] == (
        "| 8 | 2,442,240 / 1,221,120, 0.50 | 18.6 / 9.3, 0.50 | 1,082 / 541, 0.50 | 9 / 9, 1.00 | 9 / 9, 1.00 "
        "| 2.00 / 1.50, 0.75 |"
    )
