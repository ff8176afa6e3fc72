"""How several processes are started as one group, and how they end together.

A launcher (torchrun, accelerate, srun, mpirun) starts the same command several times and says to each, in its
environment, which one it is. :func:`join` makes them one group of torch.distributed, and refuses a launch in which each
would do the whole work alone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, cast

from lorafa.errors import ConfigError, LoraError, TrainingError, first_line
from lorafa.processes import Word, distributed, rank, world_size

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others in one place: one of them may evaluate or fetch a model meanwhile."""
GRACE = 20.0
"""Seconds that a process has to end by itself once another has failed; it may be stuck in a call to that one."""
FAILED, ARRIVED = "lorafa/failed", "lorafa/arrived"
"""Keys under which the first process that fails says so, and under which all say that they have come to the next work.
"""
_LAUNCHERS = (
    ("torchrun", "WORLD_SIZE", "RANK", "LOCAL_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("mpirun", "PMIX_SIZE", "PMIX_RANK", "PMIX_LOCAL_RANK"),
    ("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK"),
    ("flux run", "FLUX_JOB_SIZE", "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID"),
    ("horovodrun", "HOROVOD_SIZE", "HOROVOD_RANK", "HOROVOD_LOCAL_RANK"),
)
"""A launcher, and the variables in which it says how many processes there are and which one this is."""


@dataclass(frozen=True)
class Launch:
    """What a launcher has said to this process."""

    launcher: str
    size: int
    rank: int | None
    local_rank: int | None
    missing: tuple[str, ...]
    """Variables without which the processes cannot find each other."""
    counted: bool = True
    """Whether the launcher has said how many there are; if not, ``size`` is the least there can be."""

    def in_words(self) -> str:
        """The processes, in words."""
        return f"{'' if self.counted else 'at least '}{self.size} processes"


def launch_of(environ: Mapping[str, str]) -> Launch | None:
    """How this process was started as one of several; None where it was started alone."""
    for launcher, size, number, local in _LAUNCHERS:
        count, place = _number(environ, size, 1), _number(environ, number, None)
        counted = count > 1
        if not counted:
            if not place:  # 0: the first of one
                continue
            count = place + 1  # one that is not the first is not alone
        wanted = (*(() if counted else (size,)), number, local, "MASTER_ADDR", "MASTER_PORT")
        missing = tuple(name for name in wanted if not environ.get(name))
        if environ.get("WORLD_SIZE") == "1":  # a launcher inside of another knows of this process alone
            missing = ("WORLD_SIZE",)
        return Launch(launcher, count, place, _number(environ, local, None), missing, counted)
    return None


def _number(environ: Mapping[str, str], name: str, default: Any) -> Any:
    text = environ.get(name)
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"The variable {name} must be a whole number, found {text!r}. Let the launcher set it."
        ) from None


def require_alone(what: str, *, shares: bool = False) -> None:
    """Raises ConfigError where a launcher has started this process as one of several.

    Args:
        shares: whether processes that know nothing of each other, as those of srun, share the work out by themselves.
    """
    launch = launch_of(os.environ)
    if launch is not None and not (shares and launch.launcher == "srun"):
        raise ConfigError(
            f"{what} is no work for a group of processes, and {launch.launcher} has started {launch.in_words()}, each "
            "of which would do all of it. Start it without one."
        )


_store: Any = None
"""Where the processes of a group that :func:`join` has made leave word for each other."""
_work = 0
"""How often they have begun with something else: a failure before that is over."""


def join(command: str) -> None:
    """Make this process and the others that a launcher has started one group, if it has; :func:`leave` ends it.

    NCCL moves what is on CUDA devices, of which each process takes one, and gloo the rest.

    Args:
        command: what was started, for the error.

    Raises:
        ConfigError: the launcher has not said enough for the processes to find each other, so that each would work
            alone; or there are fewer CUDA devices than processes.
    """
    global _store
    launch = launch_of(os.environ)
    if launch is None or distributed():
        return
    if launch.missing:
        raise ConfigError(
            f"{launch.launcher} has started {launch.in_words()}, which would each do all of the work alone: they "
            f"cannot find each other without {', '.join(launch.missing)}. Start them with: torchrun "
            f"--nproc_per_node={launch.size} {command} ... (or set these variables; for one process "
            "drop the launcher)."
        )
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.size), LOCAL_RANK=str(launch.local_rank))
    import torch

    on_cuda = torch.cuda.is_available()
    if on_cuda:
        if cast(int, launch.local_rank) >= torch.cuda.device_count():
            raise ConfigError(
                f"Process {launch.rank} is number {launch.local_rank} on this machine, which has "
                f"{torch.cuda.device_count()} CUDA devices; each process needs one. Start as many processes as there "
                "are devices."
            )
        torch.cuda.set_device(cast(int, launch.local_rank))
    elif not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # accelerate makes a group of processes on CPUs only where it is told
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # each reads the weights that its adapters start from
    group: Any = torch.distributed
    _store, _, _ = next(group.rendezvous("env://", timeout=PATIENCE))
    group.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=group.PrefixStore("lorafa/group", _store),
        rank=cast(int, launch.rank),
        world_size=launch.size,
        timeout=PATIENCE,
    )


def leave() -> None:
    """Leave the group that :func:`join` has made; where NCCL may wait for a process that is gone, by ending only."""
    global _store
    if _store is None:
        return
    failed = _said(_store) is not None
    _store = None
    if not distributed():
        return
    from torch.distributed import destroy_process_group, get_backend

    if not (failed and "nccl" in get_backend()):
        destroy_process_group()


def begin_anew() -> None:
    """Begin with what goes on although something before it may have failed; all processes call it, in the same order.

    After a failure they wait here for each other: one that is still in a call to the others cannot go on with them.

    Raises:
        TrainingError: not all have come here within twice :data:`GRACE` seconds.
    """
    global _work
    if _store is None:
        return
    word, here = _said(_store), f"{ARRIVED}/{_work}"
    _store.add(here, 1)
    until, pause = time.monotonic() + 2 * GRACE, threading.Event()
    while word is not None and _store.add(here, 0) < world_size():
        if time.monotonic() > until:
            raise TrainingError(
                f"Process {word.process} has failed ({word.text}), and not all processes have come out of what they "
                "did together. Start the same command again."
            )
        pause.wait(0.1)
    _work += 1


@contextmanager
def ending_together(last_words: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """A block that ends in all processes if it fails in one, within :data:`GRACE` seconds.

    The process that fails leaves word of its error, and the others raise it in place of whatever that one's end does to
    them. One that is stuck in a call to it raises nothing any more: it says its last words and ends. A process that was
    killed leaves no word; who loses its connection says so.

    Args:
        last_words: called with the error, once, by a process that ends in such a way.

    Raises:
        LoraError: the error of the process that has failed first, of the same class.
    """
    if _store is None:
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(_store, done, last_words), daemon=True).start()
    try:
        yield
    except LoraError as error:
        _say(_store, Word.of(error))
        raise
    except (Exception, KeyboardInterrupt) as error:
        lost = next(filter(_is_lost_connection, _with_contexts(error)), None)
        if isinstance(error, KeyboardInterrupt) and lost is None:  # else a launcher has stopped this one for the lost
            _say(_store, Word.of(error))
            raise
        word = None
        with suppress(KeyboardInterrupt):  # of a launcher that has seen it too
            word = _said(_store, wait=2.0 if lost is not None else 0.0)
        if word is not None:
            raise word.error() from error
        if lost is None:
            _say(_store, Word.of(error))
            raise
        ended = TrainingError(
            "The connection to another process is lost, which has ended without a word, killed perhaps for its memory: "
            f"{first_line(lost)}. Continue from the last checkpoint (train.resume)."
        )
        _say(_store, Word.of(ended))
        raise ended from error
    finally:
        done.set()


def _with_contexts(error: BaseException) -> Iterator[BaseException]:
    """The error and those while which it was raised."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__context__


def _is_lost_connection(error: BaseException) -> bool:
    """Whether a call to the other processes has failed, in the words of torch.distributed and gloo."""
    from torch.distributed import DistError

    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed", "NCCL")
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and not isinstance(error, LoraError) and any(one in str(error) for one in words)
    )


def _say(store: Any, word: Word) -> None:
    with suppress(RuntimeError):  # the store went with the process that held it
        store.compare_set(f"{FAILED}/{_work}", "", json.dumps(asdict(word)))  # the first word stays


def _said(store: Any, wait: float = 0.0) -> Word | None:
    """The word of the process that has failed first; None where none has left one, within ``wait`` seconds."""
    pause, key = threading.Event(), f"{FAILED}/{_work}"
    for _ in range(1 + int(wait / 0.1)):
        with suppress(RuntimeError):
            if store.check([key]):
                return Word(**json.loads(store.get(key)))
        if wait:
            pause.wait(0.1)
    return None


def _watch(store: Any, done: threading.Event, last_words: Callable[[str], None]) -> None:
    """End this process where another has failed and it does not end by itself."""
    while not done.wait(1.0):
        word = _said(store)
        if word is None or word.process == rank():
            continue
        if done.wait(GRACE):
            return
        error = word.error()
        try:
            last_words(f"{type(error).__name__}: {error}")
            print(f"error: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)
