"""A million records: memory grows by some bytes a row, and a second start takes a second."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from toys.places import ROOT


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("bench_records", "harness"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import bench_records

    return bench_records


def rows_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_the_benchmark_of_records_measures_two_starts(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.measured(tmp_path, "pairs", 300)
    first, second = rows_of(capsys.readouterr().out)
    assert (first["start"], second["start"], first["rows"]) == ("first", "second", 300)
    assert (first["samples"], first["tokens"]) == (second["samples"], second["tokens"])
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


@pytest.mark.slow
def test_memory_grows_by_some_bytes_a_row(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mib = {rows: bench.measured(tmp_path, "text", rows) for rows in (100_000, 1_000_000)}
    assert (mib[1_000_000] - mib[100_000]) * 2**20 / 900_000 < bench.BYTES
    last = rows_of(capsys.readouterr().out)[-1]
    assert (last["samples"], last["start"]) == (999_900, "second")
    assert last["seconds"] < 30
