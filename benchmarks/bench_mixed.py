"""What does a batch cost in which every row has one of eight adapters?  Base, lorafa and PEFT; and adding an adapter.

    python benchmarks/bench_mixed.py [--rows 32] [--length 128] [--tokens 8] [--adapters 8] [--repeats 7]
                                     [--resident 100]

SmolLM2-135M in float32, r = 16 on all linear layers. A batch of prompts is read (prefill), then token after token is
added to it with the cache: each in a call of the model ("decode"), or all in one ``generate``, whose steps may keep
something for one another ("generate"). Rows of one adapter lie side by side ("sorted") or every one beside another
("mixed up"). "base" is the model before anything was put on it. The logits of lorafa and PEFT are compared first. Then
adapters are added one after another, up to ``--resident``: a new one must not take longer for those that are there.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from typing import Any

import torch
from harness import THREADS, Contender, emit, interleave, median, positive, timed, verdict

NAME = "mixed"
BASE, ONE, SORTED, UNSORTED, PEFT_SORTED = "base", "one adapter", "sorted", "mixed up", "PEFT"
CASES = (BASE, ONE, SORTED, UNSORTED, PEFT_SORTED)
WANTED = {("prefill", SORTED): 1.12, ("prefill", UNSORTED): 1.12, ("decode", SORTED): 1.5, ("decode", UNSORTED): 1.5,
          ("generate", SORTED): 1.5, ("generate", UNSORTED): 1.5}  # fmt: skip
"""What a case may take of the base's time."""
GROWTH = 1.2
"""What the last of many adapters may take to be added, of the time of the second: more would be growth."""


def settings() -> dict[str, Any]:
    return {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def filled(model: Any, name: str, seed: int) -> None:
    """Give an adapter values that are the same in both libraries."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted((n, p) for n, p in model.named_parameters() if f".{name}." in n):
        p.data = 0.02 * torch.randn(p.shape, generator=generator)


class Served:
    """One model with its adapters, and one batch of prompts with the tokens that follow them."""

    def __init__(self, case: str, rows: int, length: int, tokens: int, adapters: int) -> None:
        from lorafa.models.load import load_model

        self.model: Any = load_model("smollm2-135m", dtype=torch.float32, attention="sdpa")[0].eval()
        self.model.requires_grad_(False)
        given = torch.randint(
            self.model.config.vocab_size, (rows, length + tokens), generator=torch.Generator().manual_seed(0)
        )
        self.prompts, self.following = given[:, :length], given[:, length:]
        self.options: dict[str, Any] = {}
        if case == BASE:
            return
        if case == PEFT_SORTED:
            import peft as library
        else:
            import lorafa as library
        names = [f"adapter_{i}" for i in range(1 if case == ONE else adapters)]
        self.model = library.get_peft_model(self.model, library.LoraConfig(**settings()), names[0])
        for name in names[1:]:
            self.model.add_adapter(name, library.LoraConfig(**settings()))
        for seed, name in enumerate(names):
            filled(self.model, name, seed)
        self.model.eval()
        if case != ONE:
            by_row = [names[i % len(names)] for i in range(rows)]
            self.options = {"adapter_names": by_row if case == UNSORTED else sorted(by_row)}

    def _read(self) -> Any:
        return self.model(input_ids=self.prompts, use_cache=True, logits_to_keep=1, **self.options)

    def _add(self, index: int, cache: Any) -> Any:
        given = self.following[:, index : index + 1]
        return self.model(input_ids=given, past_key_values=cache, use_cache=True, **self.options)

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """Of the last prompt position and the first token after it, (2, rows, vocabulary)."""
        answer = self._read()
        return torch.stack([answer.logits[:, -1], self._add(0, answer.past_key_values).logits[:, -1]])

    @torch.no_grad()
    def prefill(self) -> float:
        """Seconds to read the batch of prompts."""
        return timed(self._read)

    @torch.no_grad()
    def decode(self) -> float:
        """Seconds to add one token, in the mean over all of them."""
        cache = self._read().past_key_values
        tokens = self.following.shape[1]
        return timed(lambda: [self._add(index, cache) for index in range(tokens)]) / tokens

    @torch.no_grad()
    def generate(self) -> float:
        """Seconds that ``generate`` takes for one token more, in the mean over all after the first two."""
        times: list[float] = []

        def stop(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            times.append(time.perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        count = self.following.shape[1] + 2
        self.model.generate(
            input_ids=self.prompts, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0,
            stopping_criteria=[stop], **self.options,
        )  # fmt: skip
        return (times[-1] - times[2]) / (len(times) - 3)

    def add(self, count: int) -> list[float]:
        """Seconds to add each of so many adapters, with few ranks for many to have room."""
        import lorafa

        taken = []
        for i in range(count):
            gc.collect()
            config = lorafa.LoraConfig(**(settings() | {"r": 1}))
            taken.append(timed(lambda i=i, config=config: self.model.add_adapter(f"more_{i}", config)))
        return taken


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=32)
    parser.add_argument("--length", type=positive, default=128, help="tokens of a prompt")
    parser.add_argument("--tokens", type=positive, default=8, help="tokens added to each")
    parser.add_argument("--adapters", type=positive, default=8)
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--resident", type=positive, default=100)
    parser.add_argument("--threads", type=positive, default=THREADS)
    arguments = parser.parse_args(words)
    made = {k: getattr(arguments, k) for k in ("rows", "length", "tokens", "adapters", "threads")}
    contenders = {case: Contender(case, Served, case=case, **made) for case in CASES}
    found = {case: contenders[case]("logits") for case in (BASE, SORTED, PEFT_SORTED)}
    expected = found.pop(PEFT_SORTED)
    errors = {case: float((logits - expected).norm() / expected.norm()) for case, logits in found.items()}
    emit(benchmark=NAME, check="logits against PEFT", errors=errors)
    if not errors[SORTED] <= 1e-4 or not errors[BASE] >= 1e-3:
        raise SystemExit("Nothing was timed: the two libraries disagree, or the adapters do nothing.")
    for part in ("prefill", "decode", "generate"):
        taken = interleave(list(contenders.values()), part, arguments.repeats)
        seconds = {case: median(values) for case, values in taken.items()}
        for case, values in taken.items():
            emit(benchmark=NAME, part=part, case=case, seconds=round(seconds[case], 5),
                 all_seconds=[round(value, 5) for value in values], **made)  # fmt: skip
        for case in (ONE, SORTED, UNSORTED, PEFT_SORTED):
            ratio, target = seconds[case] / seconds[BASE], WANTED.get((part, case))
            if target is None:
                emit(benchmark=NAME, figure=f"{part}, {case} / base", value=round(ratio, 3))
            else:
                verdict(NAME, f"{part}, {case} / base", ratio, target)
    added = contenders[ONE]("add", arguments.resident)
    few = max(len(added) // 10, 1)
    verdict(
        NAME, f"adding an adapter, the last {few} of {len(added)} / the first {few}",
        median(added[-few:]) / median(added[:few]), GROWTH, first=round(median(added[:few]), 4),
        last=round(median(added[-few:]), 4),
    )  # fmt: skip
    for contender in contenders.values():
        contender.close()


if __name__ == "__main__":
    main()
