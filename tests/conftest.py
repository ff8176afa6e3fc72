"""Every test starts from the same random state and runs on one thread, so that a failure repeats."""

from __future__ import annotations

import gc
from collections import defaultdict

import pytest
import torch

pytest.register_assert_rewrite("toys")
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases of a test marked ``matrix`` are slow, but for every n-th and (``each_word``) one with each word of the ids.

    So each kind of layer, variant or dtype has a quick case, whatever the matrix is multiplied with, and the choice is
    the same everywhere.
    """
    matrices: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("matrix"):
            matrices[item.nodeid.partition("[")[0]].append(item)
    for cases in matrices.values():
        marker = cases[0].get_closest_marker("matrix")
        (every,), each_word = marker.args, marker.kwargs.get("each_word", True)  # type: ignore[union-attr]
        known: set[str] = set()
        for number, item in enumerate(cases):
            words = set(item.nodeid.partition("[")[2].rstrip("]").split("-"))
            if number % every and not (each_word and words - known):
                item.add_marker(pytest.mark.slow)
            else:
                known |= words


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # torch.manual_seed keeps a trace of the stack for each device that is not
        torch.cuda.manual_seed_all(0)


@pytest.fixture(scope="module", autouse=True)
def _garbage_is_of_this_file() -> None:
    """Who looks for garbage, as every run does at its end, passes over what was there before: tests and imports."""
    gc.collect()
    gc.freeze()
