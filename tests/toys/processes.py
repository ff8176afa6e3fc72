"""Processes that are one of several in a group, or that run beside others: their start, and the end of a group."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
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


def enter_group(rank: int, folder: Path) -> None:
    """Make this one of two processes that meet in a folder, with what a launcher says to each in its environment."""
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # trainers look for garbage, and all that was imported is none
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # which accelerate wants to see, and does not use
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)


def launched(rank: int, port: int) -> None:
    """Say to this process what torchrun says to one of two that meet at a port."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def leave_group() -> None:
    """End this process, together with the others, once what it found is written.

    At once: where gloo's threads are still there when the interpreter ends, it is aborted now and then.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_command(rank: int, port: int, words: list[str]) -> None:
    """`lorafa` with these words in one of two processes that meet at a port, as torchrun starts it."""
    from lorafa.cli.main import main

    torch.set_num_threads(1)
    launched(rank, port)
    os._exit(main(words))
