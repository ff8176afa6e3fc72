"""Answers a second of `lorafa eval task=gsm8k`, against a batched `generate` written by hand, and in two processes.

    python benchmarks/bench_evaluation.py --data gsm8k_train.jsonl [--problems 64] [--repeats 3]

SmolLM2-135M-Instruct in bfloat16 answers GSM8K problems greedily, up to 64 new tokens. By hand: prompts sorted by
length, left padding, transformers' own `generate` with its defaults, all answers compared first. Two processes of one
thread share the problems out, against one process of one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import THREADS, Contender, emit, interleave, median, timed

NAME = "evaluation"
BATCH, NEW = 32, 64


class Answers:
    """One model and the problems; a call of ``answer`` answers all of them."""

    def __init__(self, how: str, data: str, problems: int) -> None:
        from lorafa.data.chat import encode_prompts
        from lorafa.data.sources import records_to_measure
        from lorafa.models.load import load_model

        self.how = how
        attention = "auto" if how == "lorafa" else "sdpa"
        self.model, self.tokenizer = load_model("smollm2-135m", torch.bfloat16, attention=attention)
        self.records = records_to_measure(data, {})[:problems]
        self.prompts = encode_prompts(self.records, self.tokenizer)
        self.texts: list[str] = []

    def answer(self) -> float:
        return timed(self._lorafa if self.how == "lorafa" else self._by_hand)

    def answers(self) -> list[str]:
        return self.texts

    def _lorafa(self) -> None:
        from lorafa.evals.gsm8k import evaluate

        found = evaluate(self.model, self.tokenizer, self.records, batch_size=BATCH, max_new_tokens=NEW)
        self.texts = [sample.output for sample in found.samples]

    @torch.no_grad()
    def _by_hand(self) -> None:
        self.model.eval()
        order = sorted(range(len(self.prompts)), key=lambda number: len(self.prompts[number]), reverse=True)
        pad, written = self.tokenizer.pad_token_id, {}
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            longest = max(len(self.prompts[number]) for number in chosen)
            ids = torch.tensor([[pad] * (longest - len(p)) + p for p in (self.prompts[n] for n in chosen)])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in (self.prompts[n] for n in chosen)])
            out: Any = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=pad,
                temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
            for number, row in zip(chosen, out[:, longest:], strict=True):
                written[number] = self.tokenizer.decode(row, skip_special_tokens=True)
        self.texts = [written[number] for number in range(len(self.prompts))]


def of_processes(count: int, data: str, problems: int) -> float:
    """Seconds of the whole command in so many processes of one thread."""
    command = [sys.executable, "-m", "lorafa.cli.main"]
    if count > 1:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}", "-m", "lorafa.cli.main"]
    words = ["eval", "smollm2-135m", "task=gsm8k", f"data={data}", f"eval.size={problems}"]
    words.append(f"eval.max_new_tokens={NEW}")
    with tempfile.TemporaryFile() as said:
        return timed(
            lambda: subprocess.run(
                [*command, *words], check=True, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a jsonl of question/answer rows")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--only", choices=["by_hand", "processes"], help="one part of the benchmark")
    arguments = parser.parse_args()
    data = str(Path(arguments.data).resolve())
    if arguments.only in (None, "by_hand"):
        both = [Contender(how, Answers, threads=arguments.threads, how=how, data=data, problems=arguments.problems)
                for how in ("lorafa", "by hand")]  # fmt: skip
        taken = interleave(both, "answer", arguments.repeats)
        ours, theirs = (contender("answers") for contender in both)
        same = sum(one == other for one, other in zip(ours, theirs, strict=True))
        emit(benchmark=NAME, check="equal answers", equal=same, of=len(ours))
        rates = {name: arguments.problems / median(seconds) for name, seconds in taken.items()}
        emit(benchmark=NAME, rates={name: round(rate, 3) for name, rate in rates.items()}, all_seconds=taken)
        ratio = rates["lorafa"] / rates["by hand"]
        emit(benchmark=NAME, figure="answers a second / by hand", value=round(ratio, 3), target=0.9, met=ratio >= 0.9)
        for contender in both:
            contender.close()
    if arguments.only in (None, "processes"):
        seconds = {count: [] for count in (1, 2)}
        empty = {count: [] for count in (1, 2)}
        for _ in range(arguments.repeats):
            for count in (1, 2):
                empty[count].append(of_processes(count, data, 1))
                seconds[count].append(of_processes(count, data, arguments.problems))
        alone, shared = (median(seconds[count]) - median(empty[count]) for count in (1, 2))
        emit(benchmark=NAME, all_seconds=seconds, with_one_problem=empty)
        emit(benchmark=NAME, figure="speed of two processes / one, without starting", value=round(alone / shared, 3),
             target=1.7, met=alone >= 1.7 * shared)  # fmt: skip


if __name__ == "__main__":
    main()
