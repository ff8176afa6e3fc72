"""Every test starts from the same random state and runs on one thread, so that a failure repeats."""

from __future__ import annotations

import gc

import pytest
import torch

pytest.register_assert_rewrite("toys")
torch.set_num_threads(1)


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
