"""Every test starts from the same random state and runs on one thread, so that a failure repeats."""

from __future__ import annotations

import pytest
import torch

pytest.register_assert_rewrite("toys")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    torch.manual_seed(0)
