"""What processes of one launch are to each other: who is who, what the first tells, what is refused."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorafa import launch, processes
from lorafa.errors import ConfigError, DataError, LoraError, TrainingError
from lorafa.launch import Launch, launch_of
from lorafa.processes import Word, by_turns, from_main, is_from_other, main_first, on_main
from toys.processes import enter_group, free_ports, launched, leave_group, run_group

MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*MEET, *(name for _, *names in launch._LAUNCHERS for name in names)):
        monkeypatch.delenv(name, raising=False)


# ---- a launch


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script, which srun has not started
        (TORCHRUN | MEET, Launch("torchrun", 2, 1, 1, ())),
        (TORCHRUN, Launch("torchrun", 2, 1, 1, ("MASTER_ADDR", "MASTER_PORT"))),
        (SRUN | MEET, Launch("srun", 4, 3, 1, ())),
        (SRUN, Launch("srun", 4, 3, 1, ("MASTER_ADDR", "MASTER_PORT"))),
        (MPIRUN | MEET, Launch("mpirun", 2, 0, 0, ())),
        (SRUN | {"WORLD_SIZE": "1", "RANK": "0"} | MEET, Launch("srun", 4, 3, 1, ("WORLD_SIZE",))),
        (SRUN | TORCHRUN | MEET, Launch("torchrun", 2, 1, 1, ())),
        ({"RANK": "1"} | MEET, Launch("torchrun", 2, 1, None, ("WORLD_SIZE", "LOCAL_RANK"), counted=False)),
        (
            {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"} | MEET,
            Launch("srun", 4, 3, 1, ("SLURM_STEP_NUM_TASKS",), counted=False),
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"} | MEET, Launch("mpirun", 2, 0, None, ("MPI_LOCALRANKID",))),
        ({"PMIX_RANK": "0"}, None),
        ({"PMIX_RANK": "2", "PMIX_LOCAL_RANK": "0"} | MEET, Launch("mpirun", 3, 2, 0, ("PMIX_SIZE",), counted=False)),
        *(
            ({f"{one}_SIZE": "8", f"{one}_RANK": "7", f"{one}_LOCAL_RANK": "3"} | MEET, Launch(name, 8, 7, 3, ()))
            for one, name in (("JSM_NAMESPACE", "jsrun"), ("HOROVOD", "horovodrun"))
        ),
        (
            {"FLUX_JOB_SIZE": "2", "FLUX_TASK_RANK": "1", "FLUX_TASK_LOCAL_ID": "0"},
            Launch("flux run", 2, 1, 0, ("MASTER_ADDR", "MASTER_PORT")),
        ),
        ({"FLUX_JOB_SIZE": "1", "FLUX_TASK_RANK": "0"}, None),
    ],
)
def test_a_launcher_is_known_by_what_it_says(environ: dict[str, str], said: Launch | None) -> None:
    assert launch_of(environ) == said


def test_a_variable_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"The variable WORLD_SIZE must be a whole number, found 'two'\. Let the lau"):
        launch_of({"WORLD_SIZE": "two"})


def test_a_launch_in_which_each_would_work_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError,
        match=r"srun has started 4 processes, which would each do all of the work alone: they cannot find each other "
        r"without MASTER_ADDR, MASTER_PORT\. Start them with: torchrun --nproc_per_node=4 -m lorafa\.cli\.main train",
    ):
        launch.join("-m lorafa.cli.main train")


def test_one_that_is_not_the_first_is_refused_though_nothing_says_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in ({"OMPI_COMM_WORLD_RANK": "1"} | MEET).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError,
        match=r"mpirun has started at least 2 processes, which would each do all of the work alone: they cannot find "
        r"each other without OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_LOCAL_RANK\.",
    ):
        launch.join("-m lorafa.cli.main train")


def test_more_processes_than_cuda_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    for name, value in (TORCHRUN | MEET).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"Process 1 is number 1 on this machine, which has 1 CUDA devices"):
        launch.join("-m lorafa.cli.main train")


def test_what_is_no_work_for_a_group_is_refused_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.require_alone("lorafa compare")
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    launch.require_alone("lorafa compare", shares=True)  # processes that know nothing of each other share the runs out
    with pytest.raises(
        ConfigError, match=r"lorafa merge is no work for a group of processes, and srun has started 4 processes, each"
    ):
        launch.require_alone("lorafa merge")
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ConfigError, match=r"lorafa compare is no work for a group of processes, and torchrun has started 2"
    ):
        launch.require_alone("lorafa compare", shares=True)


# ---- alone


def test_a_process_that_is_alone_is_the_first_of_one() -> None:
    assert (processes.rank(), processes.world_size(), processes.is_main()) == (0, 1, True)
    assert processes.gathered("mine") == ["mine"]
    assert from_main(lambda: 3) == 3
    assert processes.share([1, 2, 3]) == [1, 2, 3]
    assert by_turns(lambda number: number + 1, [1, 2, 3]) == [2, 3, 4]
    assert by_turns(lambda number: number + 1, []) == []
    with main_first():
        pass
    with launch.ending_together():
        pass
    with pytest.raises(DataError, match=r"^no$"), launch.ending_together():
        raise DataError("no")


# ---- two


@contextmanager
def entered(log: list[str]) -> Iterator[int]:
    log.append("in")
    yield 7
    log.append("out")


@contextmanager
def refused() -> Iterator[int]:
    raise DataError("the door is shut.")
    yield 0


def fails(error: BaseException) -> Any:
    raise error


def caught(act: Any) -> list[Any]:
    try:
        act()
    except (Exception, KeyboardInterrupt) as error:
        return [type(error).__name__, isinstance(error, LoraError), is_from_other(error), str(error)]
    return ["nothing"]


def first_of_two(rank: int, folder: Path) -> None:
    with main_first():
        if rank == 0:
            (folder / "cache").touch()
        assert (folder / "cache").exists()


def failing_first(rank: int) -> None:
    with main_first():
        if rank == 0:
            raise DataError("no cache.")
        raise AssertionError("not reached")


def work(rank: int, folder: str) -> None:
    enter_group(rank, Path(folder))
    log: list[str] = []
    calls: list[int] = []

    def doubled(number: int) -> int:
        calls.append(number)
        return 2 * number

    with on_main(entered(log)) as given:
        pass
    first_of_two(rank, Path(folder))
    found = {
        "who": [processes.rank(), processes.world_size(), processes.is_main()],
        "gathered": processes.gathered(rank),
        "from main": from_main(lambda: rank),
        "on main": [given, log],
        "refused": caught(lambda: on_main(refused()).__enter__()),
        "lora error": caught(lambda: from_main(lambda: fails(ConfigError("a bad key.")))),
        "other error": caught(lambda: from_main(lambda: fails(OSError("disk")))),
        "interrupt": caught(lambda: from_main(lambda: fails(KeyboardInterrupt()))),
        "main first": caught(lambda: failing_first(rank)),
        "share": processes.share([1, 2, 3]),
        "by turns": [by_turns(doubled, [1, 2, 3]), calls],
    }
    Path(folder, f"found-{rank}.json").write_text(json.dumps(found))
    leave_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("group")
    before = dict(os.environ)
    run_group(work, str(folder))
    assert dict(os.environ) == before
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


def test_each_knows_who_it_is(of_two: list[dict[str, Any]]) -> None:
    assert [found["who"] for found in of_two] == [[0, 2, True], [1, 2, False]]
    assert [found["gathered"] for found in of_two] == [[0, 1], [0, 1]]


def test_all_have_what_the_first_has_made(of_two: list[dict[str, Any]]) -> None:
    assert [found["from main"] for found in of_two] == [0, 0]
    assert [found["on main"] for found in of_two] == [[7, ["in", "out"]], [7, []]]


@pytest.mark.parametrize(
    ("case", "first", "others"),
    [
        ("refused", ["DataError", True, False, "the door is shut."], ["DataError", True, True, "the door is shut."]),
        ("lora error", ["ConfigError", True, False, "a bad key."], ["ConfigError", True, True, "a bad key."]),
        ("other error", ["OSError", False, False, "disk"], ["TrainingError", True, True, "OSError: disk"]),
        ("interrupt", ["KeyboardInterrupt", False, False, ""], ["TrainingError", True, True, "it was interrupted."]),
        ("main first", ["DataError", True, False, "no cache."], ["DataError", True, True, "no cache."]),
    ],
)
def test_what_fails_in_the_first_fails_in_all(
    of_two: list[dict[str, Any]], case: str, first: list[Any], others: list[Any]
) -> None:
    assert of_two[0][case] == first
    assert of_two[1][case] == [*others[:3], f"Process 0 has stopped: {others[3]}"]


def test_work_is_dealt_out_in_equal_numbers_of_calls(of_two: list[dict[str, Any]]) -> None:
    assert [found["share"] for found in of_two] == [[1, 3], [2]]
    assert [found["by turns"] for found in of_two] == [[[2, 4, 6], [1, 3]], [[2, 4, 6], [2, 1]]]


def test_errors_of_others_keep_their_class() -> None:
    error = Word(1, "DataError", "a bad row.").error()
    assert isinstance(error, DataError)
    assert is_from_other(error)
    assert not is_from_other(DataError("mine"))
    assert not isinstance(error, TrainingError)


# ---- several pieces of work, one of which fails


def one_after_another(rank: int, folder: str, port: int) -> None:
    launch.GRACE = 1.0
    launched(rank, port)
    launch.join("this test")
    outcomes: list[Any] = []
    for number in range(3):
        launch.begin_anew()
        outcomes.append(caught(lambda number=number: piece(number, rank)))
    Path(folder, f"outcomes-{rank}.json").write_text(json.dumps(outcomes))
    leave_group()


def piece(number: int, rank: int) -> None:
    with launch.ending_together():
        processes.gathered(number)
        if number == 0:
            raise DataError(f"rank {rank} fails.")
        time.sleep(2.5)  # longer than a process has that is to end for the failure of another


@pytest.mark.slow
def test_what_follows_a_failure_is_not_ended_by_it(tmp_path: Path) -> None:
    run_group(one_after_another, str(tmp_path), free_ports(1)[0])
    for rank in range(2):
        outcomes = json.loads((tmp_path / f"outcomes-{rank}.json").read_text())
        assert outcomes == [["DataError", True, False, f"rank {rank} fails."], ["nothing"], ["nothing"]]


def left_behind(rank: int, folder: str, port: int) -> None:
    launch.GRACE = 0.5
    launched(rank, port)
    launch.join("this test")
    launch.begin_anew()
    if rank == 0:
        caught(lambda: piece(0, rank))
        Path(folder, "left.json").write_text(json.dumps(caught(launch.begin_anew)))
    else:
        processes.gathered(0)  # and is never seen again
    leave_group()


def test_a_process_that_does_not_come_back_is_not_waited_for_without_end(tmp_path: Path) -> None:
    run_group(left_behind, str(tmp_path), free_ports(1)[0])
    kind, _, _, text = json.loads((tmp_path / "left.json").read_text())
    assert kind == "TrainingError"
    assert text == (
        "Process 0 has failed (rank 0 fails.), and not all processes have come out of what they did together. Start "
        "the same command again."
    )
