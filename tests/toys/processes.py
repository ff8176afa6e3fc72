"""Processes that are one of several in a group, or that run beside others: their start, and the end of a group."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

STARTS: Any = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
"""Where processes come from: one that has loaded what takes seconds, and nothing of this package, which each loads."""
STARTS.set_forkserver_preload(
    [
        "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "transformers.trainer",
        "transformers.models.llama.modeling_llama", "matplotlib.pyplot", "datasets", "hydra", "rich.console", "pytest",
    ]
)  # fmt: skip


def run_group(work: Callable[..., None], *arguments: Any, within: float = 300) -> None:
    """Call ``work(rank, *arguments)`` in two processes at the same time; both have to end well."""
    processes = [STARTS.Process(target=work, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=within)
            assert process.exitcode == 0
    finally:  # where one failed the other waits for it
        for process in processes:
            process.kill()
            process.join()


def leave_group() -> None:
    """End this process, together with the others, once what it found is written.

    At once: where gloo's threads are still there when the interpreter ends, it is aborted now and then.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
