"""The phases of a cyclic schedule: who counts when, what the gate lets through, and what becomes of a refusal."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from lorafa.alignment.schedule import Constant, Cyclic, CyclicSettings, Decision, Probe
from lorafa.errors import ConfigError

SMALL = {"task_steps": 4, "teacher_steps": 2, "rewarm_steps": 0}


def run(schedule: Cyclic, probes: Iterable[Probe], steps: int, weight: float = 0.8) -> tuple[list[str], list[Decision]]:
    """The phase of each step, and all decisions."""
    measured = iter(probes)
    schedule.begin(weight, lambda: next(measured))
    phases, decisions = [], []
    for _ in range(steps):
        phases.append("T" if schedule.share().teacher else "S")
        decisions += schedule.after_step(lambda: next(measured))
    return phases, decisions


def steady(task: float = 1.0, divergence: float = 0.5) -> Iterable[Probe]:
    """A divergence that falls by half each time, so that weights stay."""
    while True:
        yield Probe(task, divergence)
        divergence /= 2


def test_phases_take_turns_by_the_clock_and_the_task_has_the_last_steps() -> None:
    phases, decisions = run(Cyclic(CyclicSettings(**SMALL), total=19), steady(), 19)
    assert "".join(phases) == "SSSSTTSSSSTTSSSSSSS"  # after step 16 there are no two steps each for teacher and task
    assert [(d.step, d.kind, d.phase) for d in decisions] == [
        (4, "switch", "teacher"), (6, "switch", "task"), (10, "switch", "teacher"), (12, "switch", "task"),
        (16, "ended", "task"),
    ]  # fmt: skip
    assert [d.refresh for d in decisions] == [False, True, False, True, False]
    assert sum(phase == "T" for phase in phases) == 4  # the teacher runs in these steps alone


@pytest.mark.parametrize("total", range(8, 27))
def test_the_last_phase_is_the_tasks_and_no_shorter_than_the_teachers(total: int) -> None:
    phases, _ = run(Cyclic(CyclicSettings(**SMALL), total=total), steady(), total)
    found = "".join(phases)
    assert found.endswith("TT" + "S" * (2 + (total - 8) % 6))
    assert found.count("TT") == 1 + (total - 8) // 6


def test_the_teacher_may_have_the_last_steps() -> None:
    phases, _ = run(Cyclic(CyclicSettings(**SMALL, end_on_teacher=True), total=18), steady(), 18)
    assert "".join(phases) == "SSSSTTSSSSTTSSSSTT"


@pytest.mark.parametrize("total", [*range(18, 27), 40])
@pytest.mark.parametrize("trigger", ["clock", "drift"])
def test_the_last_phase_of_the_teacher_ends_with_the_training(total: int, trigger: str) -> None:
    settings = CyclicSettings(**SMALL, end_on_teacher=True, trigger=trigger)
    phases, decisions = run(Cyclic(settings, total=total), steady(), total)
    found = "".join(phases)
    assert found.endswith("STT")
    assert {len(phase) for phase in found.split("S") if phase} == {2}
    assert max(len(phase) for phase in found.split("T")) < 4 + 6
    assert len([d for d in decisions if d.begins]) == total // 6  # as many as there are whole cycles


def test_what_counts_in_a_phase() -> None:
    schedule = Cyclic(CyclicSettings(task_steps=2, teacher_steps=2, rewarm_steps=2), total=9)
    measured = iter(steady())
    schedule.begin(0.8, lambda: next(measured))
    shares = []
    for _ in range(6):
        shares.append(schedule.share())
        schedule.after_step(lambda: next(measured))
    assert [(s.task, s.teacher) for s in shares] == [(1, 0), (1, 0), (0.5, 0.8), (0.5, 0.8), (1, 0), (1, 0)]
    assert [round(s.rate, 3) for s in shares] == [1.0, 1.0, 0.3, 0.65, 0.3, 0.65]


def rates_of(schedule: Cyclic, probes: Iterable[Probe], steps: int) -> list[float]:
    """The factor on the rate of each step."""
    measured, found = iter(probes), []
    schedule.begin(0.8, lambda: next(measured))
    for _ in range(steps):
        found.append(round(schedule.share().rate, 3))
        schedule.after_step(lambda: next(measured))
    return found


def test_the_rate_rises_after_switches_alone() -> None:
    """The first phase has begun by none, and where no cycle fits in any more the task goes on."""
    settings = CyclicSettings(task_steps=5, teacher_steps=1, rewarm_steps=4)
    risen = [0.3, 0.475, 0.65, 0.825, 1.0]
    assert rates_of(Cyclic(settings, total=18), steady(), 18) == [1.0] * 5 + [0.3] + risen + [0.3] + risen + [1.0]
    refused = [Probe(1.0, 0.5), Probe(2.0, 0.5), *[Probe(1.0, 0.5)] * 20]
    assert rates_of(Cyclic(settings, total=60), refused, 10) == [1.0] * 10


def test_the_gate_refuses_what_made_the_task_worse_and_rolls_back_after_two() -> None:
    probes = [Probe(1.0, 0.5), Probe(1.02, 0.4), Probe(1.02, 0.4), *[Probe(1.0, 0.3)] * 9]
    schedule = Cyclic(CyclicSettings(**SMALL), total=60)
    phases, decisions = run(schedule, probes, 13)
    assert "".join(phases) == "SSSSSSSSSSSST"
    assert [(d.step, d.kind) for d in decisions] == [(4, "refused"), (8, "rolled back"), (12, "switch")]
    assert decisions[1].roll_back
    assert "1.02 on the probe is more than 1% above 1" in decisions[0].why
    assert schedule.state.refusals == 0


def test_after_a_roll_back_the_rate_rises_to_half() -> None:
    schedule = Cyclic(CyclicSettings(task_steps=2, teacher_steps=2, rewarm_steps=2), total=60)
    run(schedule, [Probe(1.0, 0.5), Probe(2.0, 0.4), Probe(2.0, 0.4)], 4)
    rates = []
    for _ in range(3):
        rates.append(schedule.share().rate)
        schedule.after_step(lambda: Probe(2.0, 0.4))
    assert [round(rate, 3) for rate in rates] == [0.15, 0.325, 0.5]


def test_without_a_gate_every_proposal_is_taken() -> None:
    probes = [Probe(float(i + 1), 0.5**i) for i in range(9)]
    phases, decisions = run(Cyclic(CyclicSettings(**SMALL, gate=False), total=40), probes, 12)
    assert "".join(phases) == "SSSSTTSSSSTT"
    assert all(d.kind in ("switch", "reweighted") for d in decisions)


def test_a_gate_that_refuses_forever_ends_the_cycles_and_says_so() -> None:
    probes = [Probe(1.0, 0.5), *[Probe(9.0, 0.5)] * 50]
    schedule = Cyclic(CyclicSettings(**SMALL), total=200)
    phases, decisions = run(schedule, probes, 60)
    assert set(phases) == {"S"}
    assert [d.kind for d in decisions].count("rolled back") == 3
    assert decisions[-1].kind == "ended"
    assert "the gate lets no phase through" in decisions[-1].why


def test_a_probe_that_is_nan_is_refused() -> None:
    _, decisions = run(Cyclic(CyclicSettings(**SMALL), total=60), [Probe(1.0, 0.5), Probe(float("nan"), 0.5)], 4)
    assert decisions[0].kind == "refused"


@pytest.mark.parametrize(
    ("before", "after", "weight"),
    [
        (Probe(1.0, 0.5), Probe(1.0, 0.49), 1.2),  # fell by less than 5 %
        (Probe(1.0, 0.5), Probe(1.0, 0.2), 0.8),
        (Probe(1.0, 0.5), Probe(1.2, 0.2), 0.56),  # the task's loss rose by more than 10 %
    ],
)
def test_the_weight_is_adapted_at_the_end_of_the_teachers_phase(before: Probe, after: Probe, weight: float) -> None:
    schedule = Cyclic(CyclicSettings(**SMALL, gate=False), total=60)
    run(schedule, [before, before, after], 6)
    assert schedule.state.weight == pytest.approx(weight)


def test_the_weight_stays_within_an_eighth_and_eight_times() -> None:
    for task, limit in ((1.0, 8.0), (1.2, 1 / 8)):
        schedule = Cyclic(CyclicSettings(**SMALL, gate=False), total=1000)
        run(schedule, (Probe(task**i, 0.5) for i in range(1000)), 400, weight=1.0)
        assert schedule.state.weight == pytest.approx(limit)


def test_drift_starts_the_teachers_phase_early_but_not_at_once() -> None:
    settings = CyclicSettings(task_steps=8, teacher_steps=2, rewarm_steps=0, trigger="drift")
    calm = [Probe(1.0, 0.5), Probe(1.0, 0.55), Probe(1.0, 0.4), Probe(1.0, 0.49)]
    phases, decisions = run(Cyclic(settings, total=60), [*calm, Probe(1.0, 0.1)], 8)
    assert "".join(phases) == "SSSSSSTT"  # 0.49 > 1.2 * 0.4, at the third quarter
    assert "has left 0.4" in decisions[0].why


@pytest.mark.parametrize("task_steps", [1, 2, 3, 5, 6, 7, 8])
def test_drift_starts_no_phase_before_a_quarter_of_the_tasks_is_done(task_steps: int) -> None:
    settings = CyclicSettings(task_steps=task_steps, teacher_steps=1, rewarm_steps=0, trigger="drift")
    growing = (Probe(1.0, 0.1 * 2.0**i) for i in range(100))
    phases, _ = run(Cyclic(settings, total=80), growing, 40)
    lengths = [len(phase) for phase in "".join(phases).split("T")[:-1]]
    assert min(lengths) >= task_steps / 4


def test_what_was_measured_of_the_last_teacher_says_nothing_of_the_next() -> None:
    settings = CyclicSettings(task_steps=8, teacher_steps=2, rewarm_steps=0, trigger="drift")
    probes = [Probe(1.0, 0.5), Probe(1.0, 0.5), Probe(1.0, 0.5), Probe(1.0, 0.5), Probe(1.0, 0.5)]
    for follows, wanted in ((False, "SSSSSSSSTTSST"), (True, "SSSSSSSSTTSSS")):
        schedule = Cyclic(settings, total=60)
        measured = iter([*probes, Probe(1.0, 0.01), *[Probe(1.0, 0.02)] * 9])
        schedule.begin(0.8, lambda measured=measured: next(measured))  # type: ignore[misc]
        phases = []
        for _ in range(13):
            phases.append("T" if schedule.share().teacher else "S")
            for decision in schedule.after_step(lambda measured=measured: next(measured)):  # type: ignore[misc]
                if decision.refresh and follows:
                    schedule.followed()
        assert "".join(phases) == wanted


def test_it_goes_on_in_the_middle_of_a_phase() -> None:
    settings = CyclicSettings(**SMALL)
    whole, _ = run(Cyclic(settings, total=30), steady(), 30)
    first = Cyclic(settings, total=30)
    measured = iter(steady())
    first.begin(0.8, lambda: next(measured))
    for _ in range(11):
        first.after_step(lambda: next(measured))
    state = json.loads(json.dumps(first.state_dict()))
    second = Cyclic(settings, total=30)
    second.load_state_dict(state)
    rest = []
    for _ in range(19):
        rest.append("T" if second.share().teacher else "S")
        second.after_step(lambda: next(measured))
    assert rest == whole[11:]


def test_a_constant_schedule_never_changes() -> None:
    schedule = Constant(0.3)
    assert schedule.after_step(lambda: Probe(1.0, 1.0)) == []
    assert (schedule.share().task, schedule.share().teacher, schedule.share().rate) == (1.0, 0.3, 1.0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"task_steps": 0}, "align.task_steps must be an integer >= 1"),
        ({"trigger": "drfit"}, "align.trigger"),
        ({"gate": "yes"}, "align.gate"),
        ({"drift": 0.0}, "align.drift must be a number above 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        CyclicSettings(**settings)
