"""Every test starts from the same random state and runs on one thread, so that a failure repeats."""

from __future__ import annotations

import gc

import pytest
import torch

pytest.register_assert_rewrite("toys")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Who looks for garbage from here on, as every run does at its end, passes over the tests and what they import."""
    gc.collect()
    gc.freeze()
