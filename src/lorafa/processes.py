"""The processes that work on one thing together: who is who, what the first tells the others, how they end together.

A launcher (torchrun, accelerate, srun, mpirun) starts the same command several times and says to each, in its
environment, which one it is. :func:`join` makes them one group of torch.distributed, and refuses a launch in which each
would do the whole work alone. Everything else here also serves a group that somebody else has made, and a process that
is alone: then it is the first of one.

What several processes do together is to be called by all of them, in the same order.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

from lorafa import errors
from lorafa.errors import ConfigError, LoraError, TrainingError, first_line

T = TypeVar("T")
R = TypeVar("R")

PATIENCE = timedelta(hours=1)
"""How long a process waits for the others in one place: one of them may evaluate or fetch a model meanwhile."""
GRACE = 20.0
"""Seconds that a process has to end by itself once another has failed; it may be stuck in a call to that one."""
FAILED = "lorafa/failed"
"""Key under which the first process that fails says so."""
_LAUNCHERS = (
    ("torchrun", "WORLD_SIZE", "RANK", "LOCAL_RANK"),
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpirun", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
)
"""A launcher, and the variables in which it says how many processes there are and which one this is."""


# ---- who is who


def distributed() -> bool:
    """Whether there is a group of torch.distributed."""
    torch = sys.modules.get("torch")  # who has not loaded it has made no group
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()


def rank() -> int:
    """Which of the processes this is, counted from 0."""
    return _dist().get_rank() if distributed() else 0


def world_size() -> int:
    """How many there are."""
    return _dist().get_world_size() if distributed() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def _dist() -> Any:
    import torch

    return torch.distributed


# ---- one group


@dataclass(frozen=True)
class Launch:
    """What a launcher has said to this process."""

    launcher: str
    size: int
    rank: int | None
    local_rank: int | None
    missing: tuple[str, ...]
    """Variables without which the processes cannot find each other."""


def launch_of(environ: Mapping[str, str]) -> Launch | None:
    """How this process was started as one of several; None where it was started alone."""
    for launcher, size, number, local in _LAUNCHERS:
        if _number(environ, size, 1) <= 1:
            continue
        wanted = (number, local, "MASTER_ADDR", "MASTER_PORT")
        missing = tuple(name for name in wanted if not environ.get(name))
        if environ.get("WORLD_SIZE") == "1":  # a launcher inside of another knows of this process alone
            missing = ("WORLD_SIZE",)
        places = _number(environ, number, None), _number(environ, local, None)
        return Launch(launcher, _number(environ, size, 1), places[0], places[1], missing)
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


def require_alone(what: str) -> None:
    """Raises ConfigError where torchrun or mpirun has started this process as one of several."""
    launch = launch_of(os.environ)
    if launch is not None and launch.launcher != "srun":  # whose processes know nothing of each other
        raise ConfigError(
            f"{what} is no work for a group of processes, and {launch.launcher} has started {launch.size}. Start it "
            "without one."
        )


_store: Any = None
"""Where the processes of a group that :func:`join` has made leave word for each other."""


def join(command: str) -> None:
    """Make this process and the others that a launcher has started one group, if it has; :func:`leave` ends it.

    NCCL moves what is on CUDA devices, of which each process takes one, and gloo the rest.

    Args:
        command: what was started, as torchrun takes it, for the error.

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
            f"{launch.launcher} has started {launch.size} processes, which would each do all of the work alone: they "
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
    group = _dist()
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
    if distributed() and not (failed and "nccl" in _dist().get_backend()):
        _dist().destroy_process_group()


# ---- what they tell each other


def barrier() -> None:
    """Wait until all are here."""
    gathered(None)


def gathered(thing: T) -> list[T]:
    """What each has, in their order. Tensors inside must be on the CPU."""
    if not distributed():
        return [thing]
    everyone: list[T | None] = [None] * world_size()
    _dist().all_gather_object(everyone, thing)
    return cast(list[T], everyone)


def share(things: Sequence[T]) -> list[T]:
    """Those of the things that are this process's: they are dealt out by turns."""
    return list(things[rank() :: world_size()])


def shared_out(work: Callable[[T], R], things: Sequence[T]) -> list[R]:
    """``work`` of every thing, in their order, of which each process does its share. The results are on the CPU.

    All call ``work`` equally often, as a model that is spread over them needs it: one that has nothing left does the
    first thing again, and that result is left out.
    """
    rounds = range(0, len(things), world_size())
    own = [work(things[first + rank()] if first + rank() < len(things) else things[0]) for first in rounds]
    turns = zip(*gathered(own), strict=True)
    return [result for turn in turns for result in turn][: len(things)]


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` gives in the first process, in all of them; where it raises there, all raise."""
    if not distributed():
        return make()
    told: list[Any] = [None, None]
    own: BaseException | None = None
    if is_main():
        try:
            told[0] = make()
        except BaseException as error:  # an interrupt too, or the others would wait
            own, told[1] = error, _Word.of(error)
    _dist().broadcast_object_list(told, src=0)
    if own is not None:
        raise own
    if told[1] is not None:
        raise told[1].error()
    return cast(T, told[0])


@contextmanager
def on_main(block: AbstractContextManager[T]) -> Iterator[T]:
    """The first process enters a block and leaves it; the others get what it gives, or raise what it raises."""
    with ExitStack() as entered:
        yield from_main(lambda: entered.enter_context(block))


@contextmanager
def main_first() -> Iterator[None]:
    """The first process runs the block while the others wait; then they do, and find in a cache what it has put there.

    Where it fails in the first process, all raise its error.
    """
    if not distributed():
        yield
        return
    if not is_main():
        from_main(lambda: None)
        yield
        return
    try:
        yield
    except BaseException as error:
        failed = error

        def fail() -> NoReturn:
            raise failed

        from_main(fail)
    else:
        from_main(lambda: None)


# ---- how they end


class FromOther:
    """Marks an error that has happened in another process, and is raised here because of that."""


def is_from_other(error: BaseException) -> bool:
    """Whether the error has happened in another process, which says it there."""
    return isinstance(error, FromOther)


@dataclass(frozen=True)
class _Word:
    """What a process says of the error that it has ended with."""

    process: int
    kind: str
    """The class in `lorafa.errors` that is nearest to the error's."""
    text: str

    @classmethod
    def of(cls, error: BaseException) -> _Word:
        named = [kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__]
        text = str(error) if named else f"{type(error).__name__}: {first_line(error)}"
        if isinstance(error, KeyboardInterrupt):
            text = "it was interrupted."
        return cls(rank(), named[0].__name__ if named else "TrainingError", text)

    def error(self) -> LoraError:
        """The error as another process raises it."""
        kind = getattr(errors, self.kind)
        marked = type(self.kind, (FromOther, kind), {"__module__": kind.__module__})
        return cast(LoraError, marked(f"Process {self.process} has stopped: {self.text}"))


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
        _say(_store, _Word.of(error))
        raise
    except (Exception, KeyboardInterrupt) as error:
        lost = any(map(_is_lost_connection, _with_contexts(error)))
        if isinstance(error, KeyboardInterrupt) and not lost:  # otherwise a launcher has stopped this one for the lost
            _say(_store, _Word.of(error))
            raise
        word = None
        with suppress(KeyboardInterrupt):  # of a launcher that has seen it too
            word = _said(_store, wait=2.0 if lost else 0.0)
        if word is not None:
            raise word.error() from error
        if not lost:
            _say(_store, _Word.of(error))
            raise
        ended = TrainingError(
            "Another process has ended without a word: it was killed, perhaps for its memory. Continue from the last "
            "checkpoint (train.resume)."
        )
        _say(_store, _Word.of(ended))
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


def _say(store: Any, word: _Word) -> None:
    with suppress(RuntimeError):  # the store went with the process that held it
        store.compare_set(FAILED, "", json.dumps(asdict(word)))  # the first word stays


def _said(store: Any, wait: float = 0.0) -> _Word | None:
    """The word of the process that has failed first; None where none has left one, within ``wait`` seconds."""
    pause = threading.Event()
    for _ in range(1 + int(wait / 0.1)):
        with suppress(RuntimeError):
            if store.check([FAILED]):
                return _Word(**json.loads(store.get(FAILED)))
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
