"""The end of a process that was one of several in a group."""

from __future__ import annotations

import os
import sys

import torch


def leave_group() -> None:
    """End this process, together with the others, once what it found is written.

    At once: where gloo's threads are still there when the interpreter ends, it is aborted now and then.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
