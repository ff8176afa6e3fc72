"""What a teacher adds to a training step of SmolLM2-135M, in time and peak memory.

    python benchmarks/bench_alignment.py [--data gsm8k_train.jsonl] [--steps 5] [--only steps one_forward]
    python benchmarks/bench_alignment.py --threads 1 --clock cpu --layers 4     a quick look on a busy machine

bfloat16, all linear layers, r = 16, dropout 0.05, a batch of 8 problems with the answers supervised; forward, backward,
AdamW and what the alignment does after a step. Against a step without a teacher: the base with masked_target, another
model of the same size with fkl, and a cycle of the default lengths (200 steps of the task, 50 of a snapshot with fkl,
two switches with a probe of 32 rows), put together from one step of each phase and both switches.

one_forward: what student and teacher in one batch of twice the rows could save at most, which is what one forward pass
of the frozen base over 2 B rows takes less than two over B rows.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_training_step import ROWS, batch
from harness import THREADS, Contender, emit, interleave, median, positive, verdict

NAME = "alignment"
PROBE_ROWS = 32
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""What seconds are: those that pass, or those that the process computes, which other work disturbs less."""
TARGETS = {"base": 1.5, "external": 1.7, "cyclic": 1.15}
"""Teacher -> the most that its step may take, as a multiple of the plain one."""
PEAK = 1.15
"""The most that the peak with the base as the teacher may be, as a multiple of the plain one."""


class Training:
    """One model, one batch, one teacher."""

    def __init__(self, teacher: str, data: str, clock: str, layers: int | None) -> None:
        import lorafa
        from lorafa.alignment import Alignment
        from lorafa.alignment.schedule import CyclicSettings
        from lorafa.models.load import load_model

        torch.manual_seed(0)
        base, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16)
        _cut(base, layers)
        self.clock = CLOCKS[clock]
        self.batch = batch(data, tokenizer)
        settings: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
        self.model = lorafa.get_peft_model(base, lorafa.LoraConfig(task_type="CAUSAL_LM", **settings)).train()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:  # a student that has left its base
                torch.nn.init.normal_(parameter, std=0.02)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        more: dict[str, Any] = {"weight": 0.0} if teacher == "plain" else {}
        given: Any = {"plain": "base", "cyclic": "snapshot"}.get(teacher, teacher)
        if teacher == "external":
            given = load_model("smollm2-135m", dtype="auto")[0]
            _cut(given, layers)
        self.lengths = CyclicSettings()
        if teacher == "cyclic":
            phases = CyclicSettings(task_steps=1, teacher_steps=1, gate=False)
            more |= {"schedule": phases, "steps": 10**9, "probe": [self.batch] * (PROBE_ROWS // ROWS)}
        self.alignment = Alignment(self.model, given, **more)

    def forward_and_backward(self) -> float:
        begun = self.clock()
        self.optimizer.zero_grad(set_to_none=True)
        self.alignment.loss(self.model, self.batch).backward()
        self.optimizer.step()
        return self.clock() - begun

    def after(self) -> float:
        begun = self.clock()
        self.alignment.after_step(self.model, self.optimizer)
        return self.clock() - begun

    def step(self) -> float:
        """Seconds of a step."""
        return self.forward_and_backward() + self.after()

    def cycle(self) -> float:
        """Seconds of a step in the mean over a cycle of the default lengths."""
        task, first, teacher, second = (part() for _ in range(2) for part in (self.forward_and_backward, self.after))
        K_s, K_t = self.lengths.task_steps, self.lengths.teacher_steps
        return (K_s * task + K_t * teacher + first + second) / (K_s + K_t)

    def divergence(self) -> float | None:
        return self.alignment.last_divergence

    def once(self) -> float:
        """Seconds of two forward passes of the frozen base, as student and teacher take them apart."""
        return self._read(self.batch["input_ids"]) + self._read(self.batch["input_ids"])

    def joined(self) -> float:
        """Seconds of one over the rows of both."""
        return self._read(torch.cat([self.batch["input_ids"]] * 2))

    @torch.no_grad()
    def _read(self, ids: torch.Tensor) -> float:
        body: Any = self.model.get_base_model().base_model
        with self.model.disable_adapter():
            begun = self.clock()
            body(input_ids=ids, use_cache=False)
            return self.clock() - begun


def _cut(model: Any, layers: int | None) -> None:
    """Keep the first layers of a model alone."""
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers


def steps(turns: int, threads: int, teachers: list[str], **settings: Any) -> None:
    """Every teacher against the plain step, one pair at a time: all of them together do not fit into memory."""
    for name in teachers:
        pair = [Contender(one, Training, threads=threads, teacher=one, **settings) for one in ("plain", name)]
        method = "cycle" if name == "cyclic" else "step"  # of the plain one a mean over equal steps
        taken = interleave(pair, method, turns)
        seconds = {one: median(values) for one, values in taken.items()}
        peaks = {one.name: round(one.peak_mib()) for one in pair}
        each = {one: [round(value, 3) for value in values] for one, values in taken.items()}
        ratio, divergence = seconds[name] / seconds["plain"], pair[1]("divergence")
        verdict(NAME, f"time, {name} / plain", ratio, TARGETS[name], seconds=each, peak_mib=peaks,
                divergence=divergence, threads=threads, **_shown(settings))  # fmt: skip
        if name == "base":
            verdict(NAME, "peak, base / plain", peaks["base"] / peaks["plain"], PEAK)
        for one in pair:
            one.close()


def one_forward(turns: int, threads: int, teachers: list[str], **settings: Any) -> None:
    """The most that one forward pass for student and teacher could save."""
    both = Contender("plain", Training, threads=threads, teacher="plain", **settings)
    for method in ("once", "joined", "step"):
        both(method)
    taken: dict[str, list[float]] = {"once": [], "joined": [], "step": []}
    for turn in range(turns):
        for method in ("once", "joined") if turn % 2 == 0 else ("joined", "once"):
            taken[method].append(both(method))
    taken["step"].append(both("step"))
    apart, joined, step = (median(taken[method]) for method in ("once", "joined", "step"))
    emit(benchmark=NAME, figure="one forward over 2 B rows / two over B rows", value=round(joined / apart, 3),
         apart=round(apart, 3), joined=round(joined, 3), threads=threads, **_shown(settings),
         each=[round(one / other, 3) for one, other in zip(taken["joined"], taken["once"], strict=True)],
         most_saved_of_a_plain_step=round((apart - joined) / step, 3))  # fmt: skip
    both.close()


def _shown(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("clock", "layers") if settings[name] is not None}


PARTS = {"steps": steps, "one_forward": one_forward}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="word_problems", help="a jsonl of question/answer rows")
    parser.add_argument("--steps", type=positive, default=5, help="turns of each contender")
    parser.add_argument("--threads", type=positive, default=THREADS)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--teachers", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--layers", type=positive, help="keep so many of the 30 layers, for a quick look")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    data = str(Path(arguments.data).resolve()) if Path(arguments.data).exists() else arguments.data
    settings = {"data": data, "clock": arguments.clock, "layers": arguments.layers}
    for part in arguments.only:
        PARTS[part](arguments.steps, arguments.threads, arguments.teachers, **settings)


if __name__ == "__main__":
    main()
