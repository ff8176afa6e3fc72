"""What does an adapter cost when the model answers?  Base, LoRA, LoRA-FA and merged, lorafa and PEFT, on SmolLM2-135M.

    python benchmarks/bench_inference.py [--rows 4] [--length 256] [--tokens 32] [--repeats 7]

bfloat16, all linear layers, r = 16. One batch of prompts is read (prefill), then token after token is added to it with
the cache (decode); the tokens are given, so all contenders do the same work. The logits of both are compared first, in
float32. A table for reading goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from harness import THREADS, Contender, emit, interleave, median, timed, verdict

NAME = "inference"
BASE, LORA, LORA_FA, MERGED = "base", "LoRA", "LoRA-FA", "merged"
PEFT_LORA, PEFT_MERGED = "PEFT LoRA", "PEFT merged"
NOISE = 1.03
"""What must cost nothing may differ by this much."""
LONGEST = 8192
"""Positions SmolLM2 has: max_position_embeddings."""


class Answers:
    """One model and one batch of prompts with the tokens that follow them."""

    def __init__(self, case: str, rows: int, length: int, tokens: int) -> None:
        from lorafa.models.load import load_model

        model, _ = load_model("smollm2-135m", dtype=torch.bfloat16, attention="sdpa")
        generator = torch.Generator().manual_seed(0)
        given = torch.randint(model.config.vocab_size, (rows, length + tokens), generator=generator)
        self.prompts, self.following = given[:, :length], given[:, length:]
        self.model = self._adapted(case, model).eval().float()
        if case in (MERGED, PEFT_MERGED):
            self.model = self.model.merge_and_unload()
        self.logits = self._logits()
        for name, parameter in self.model.named_parameters():
            if "lora_" not in name:  # adapters are float32 in both libraries
                parameter.data = parameter.data.bfloat16()

    def _adapted(self, case: str, model: Any) -> Any:
        settings: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
        settings["task_type"] = "CAUSAL_LM"
        if case == BASE:
            return model
        if case.startswith("PEFT"):
            import peft

            model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        else:
            import lorafa

            model = lorafa.get_peft_model(model, lorafa.LoraConfig(**settings, freeze_A=case == LORA_FA))
        factors = sorted((name, p) for name, p in model.named_parameters() if "lora_" in name)
        for index, (_, parameter) in enumerate(factors):
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        return model

    def _read(self) -> Any:
        return self.model(self.prompts, use_cache=True, logits_to_keep=1)

    def _add(self, index: int, cache: Any) -> Any:
        return self.model(self.following[:, index : index + 1], past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def _logits(self) -> torch.Tensor:
        """The next token's logits after the prompts and after every added token, (1 + tokens, rows, vocabulary)."""
        answer = self._read()
        rows = [answer.logits[:, -1]]
        for index in range(self.following.shape[1]):
            rows.append(self._add(index, answer.past_key_values).logits[:, -1])
        return torch.stack(rows)

    def check(self) -> torch.Tensor:
        return self.logits.clone()  # made in inference mode, which cannot be sent

    @torch.inference_mode()
    def prefill(self) -> float:
        """Seconds to read the batch of prompts."""
        return timed(self._read)

    @torch.inference_mode()
    def decode(self) -> float:
        """Seconds to add one token, in the mean over all of them."""
        cache = self._read().past_key_values
        tokens = self.following.shape[1]
        return timed(lambda: [self._add(index, cache) for index in range(tokens)]) / tokens


def agree(contenders: Mapping[str, Contender]) -> None:
    """Refuse to time wrong answers: all adapted models give the same logits, and not those of the base."""
    logits = {name: contender("check") for name, contender in contenders.items()}
    expected = logits[PEFT_LORA]
    errors = {name: float((found - expected).norm() / expected.norm()) for name, found in logits.items()}
    emit(benchmark=NAME, check=f"logits against {PEFT_LORA}, float32", errors=errors)
    wrong = [name for name, error in errors.items() if name != BASE and error > 1e-4]
    if wrong or errors[BASE] < 1e-3:
        raise SystemExit(
            f"Nothing was timed: {', '.join(wrong) or 'the adapters'} {'disagree' if wrong else 'do nothing'}."
        )


def table(seconds: Mapping[str, Mapping[str, float]], tokens: int) -> str:
    """Markdown: a row for prefill, a token, and the whole answer; a column a contender."""
    names = list(seconds["prefill"])
    whole = {name: seconds["prefill"][name] + tokens * seconds["decode"][name] for name in names}
    rows = {"prefill": seconds["prefill"], "a token": seconds["decode"], f"prefill and {tokens} tokens": whole}
    lines = ["| SmolLM2-135M | " + " | ".join(f"{name} (s)" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(f"{found[name]:.4f}" for name in names) + " |" for row, found in rows.items()]
    return "\n".join(lines)


def positive(text: str) -> int:
    """An integer >= 1, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, found {text!r}")
    return int(text)


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Checked before anything loads; what is wrong ends the program with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, default=4, help="prompts in the batch")
    parser.add_argument("--length", type=positive, default=256, help="tokens of a prompt")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens added to each")
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=THREADS)
    arguments = parser.parse_args(words)
    whole = arguments.length + arguments.tokens
    if whole > LONGEST:
        parser.error(f"--length and --tokens together are {whole} positions, the model has {LONGEST}: give fewer")
    return arguments


def main() -> None:
    arguments = read_arguments()
    size = {"rows": arguments.rows, "length": arguments.length, "tokens": arguments.tokens}
    cases = (BASE, LORA, LORA_FA, MERGED, PEFT_LORA, PEFT_MERGED)
    contenders = {case: Contender(case, Answers, threads=arguments.threads, case=case, **size) for case in cases}
    agree(contenders)
    seconds: dict[str, dict[str, float]] = {}
    for part in ("prefill", "decode"):
        taken = interleave(list(contenders.values()), part, arguments.repeats)
        s = seconds[part] = {case: median(values) for case, values in taken.items()}
        for case, values in taken.items():
            emit(benchmark=NAME, part=part, case=case, seconds=round(s[case], 5),
                 all_seconds=[round(value, 5) for value in values], **size)  # fmt: skip
        verdict(NAME, f"{part}, LoRA / PEFT's LoRA", s[LORA] / s[PEFT_LORA], 1.0)
        verdict(NAME, f"{part}, LoRA-FA / LoRA", s[LORA_FA] / s[LORA], NOISE)
        verdict(NAME, f"{part}, merged / base", s[MERGED] / s[BASE], NOISE)
        verdict(NAME, f"{part}, merged / PEFT's merged", s[MERGED] / s[PEFT_MERGED], NOISE)
        for case in (LORA, LORA_FA, PEFT_LORA, PEFT_MERGED):
            emit(benchmark=NAME, figure=f"{part}, {case} / base", value=round(s[case] / s[BASE], 3))
    print(table(seconds, arguments.tokens), file=sys.stderr)
    for contender in contenders.values():
        contender.close()


if __name__ == "__main__":
    main()
