"""What does an adapter cost when the model answers?  Base, LoRA, LoRA-FA and merged, in lorafa and in PEFT.

    python benchmarks/bench_inference.py [--model opt-125m] [--targets q_proj v_proj] [--cases base LoRA merged]
                                         [--rows 4] [--length 256] [--tokens 32] [--repeats 7]

bfloat16, r = 16 on all linear layers or on the targets named. SmolLM2-135M has its weights, OPT models have their shape
and random weights: the work is the same. One batch of prompts is read (prefill), then token after token is added to it
with the cache (decode); the tokens are given, so all contenders do the same work. The logits of all are compared first,
in float32, one model after the other. All timed models are in memory at once: about 0.5 GiB a case and the weights.
A table for reading goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from harness import THREADS, Contender, emit, interleave, median, positive, timed, verdict

from lorafa.models import MODELS, loadable
from lorafa.runs.peaks import RUN, Peaks, peak_rss_bytes
from lorafa.train.memory import return_freed_memory

NAME = "inference"
BASE, LORA, LORA_FA, MERGED = "base", "LoRA", "LoRA-FA", "merged"
PEFT_LORA, PEFT_MERGED = "PEFT LoRA", "PEFT merged"
CASES = (BASE, LORA, LORA_FA, MERGED, PEFT_LORA, PEFT_MERGED)
SMOLLM2 = "smollm2-135m"
KNOWN = {SMOLLM2: 8192, "opt-125m": 2048, "opt-350m": 2048, "opt-1.3b": 2048}
"""Models, and the positions each has: max_position_embeddings."""
NOISE = 1.03
"""What must cost nothing may differ by this much."""
WANTED = (
    (LORA, PEFT_LORA, 1.0), (LORA_FA, LORA, NOISE), (MERGED, BASE, NOISE), (MERGED, PEFT_MERGED, NOISE),
    (PEFT_MERGED, BASE, NOISE),
)  # fmt: skip
"""Ratios of times, and what they may be."""
CLAIMED = 1.03
"""The most that an adapter adds, as a document on PEFT's LoRA has it; docs/claims.md says what came out."""


def plain_model(name: str) -> Any:
    """A model by name in bfloat16: with its weights where they can be had, else with random ones, always the same."""
    if name in loadable():
        from lorafa.models.load import load_model

        return load_model(name, dtype=torch.bfloat16, attention="sdpa")[0]
    import transformers

    config = transformers.AutoConfig.for_model(**MODELS.get(name).shape)
    torch.manual_seed(0)
    make = transformers.AutoModelForCausalLM.from_config
    return make(config, dtype=torch.bfloat16, attn_implementation="sdpa")


class Answers:
    """One model and one batch of prompts with the tokens that follow them.

    Args:
        case: one of ``CASES``.
        model: one of ``KNOWN``.
        targets: of the adapter, as its config takes them.
        rows, length, tokens: prompts, tokens of each, tokens added to each.
        exact: all in float32, to compare with others.
    """

    def __init__(
        self, case: str, model: str, targets: str | list[str], rows: int, length: int, tokens: int, exact: bool = False
    ) -> None:
        plain = plain_model(model)
        generator = torch.Generator().manual_seed(0)
        given = torch.randint(plain.config.vocab_size, (rows, length + tokens), generator=generator)
        self.prompts, self.following = given[:, :length], given[:, length:]
        self.model = self._adapted(case, plain, targets).eval()
        if exact:
            self.model.float()
        if case in (MERGED, PEFT_MERGED):
            self.model = self.model.merge_and_unload()
        # Whether a weight is trained decides how torch's matmul multiplies a slice of rows with it, without gradients
        # too: of a frozen head it makes a copy for each row. An adapted model's is frozen, so all are.
        self.model.requires_grad_(False)
        return_freed_memory()
        self.measures_itself = Peaks().scope == RUN
        self.held = peak_rss_bytes() or 0

    def _adapted(self, case: str, model: Any, targets: str | list[str]) -> Any:
        settings: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": targets, "task_type": "CAUSAL_LM"}
        if case == BASE:
            return model
        if case.startswith("PEFT"):
            import peft

            model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        else:
            import lorafa

            model = lorafa.get_peft_model(model, lorafa.LoraConfig(**settings, freeze_A=case == LORA_FA))
        factors = sorted((name, p) for name, p in model.named_parameters() if "lora_" in name)
        for index, (_, parameter) in enumerate(factors):  # float32 in both libraries
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        return model

    def _read(self) -> Any:
        return self.model(self.prompts, use_cache=True, logits_to_keep=1)

    def _add(self, index: int, cache: Any) -> Any:
        return self.model(self.following[:, index : index + 1], past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def logits(self) -> torch.Tensor:
        """The next token's logits after the prompts and after every added token, (1 + tokens, rows, vocabulary)."""
        answer = self._read()
        rows = [answer.logits[:, -1]]
        for index in range(self.following.shape[1]):
            rows.append(self._add(index, answer.past_key_values).logits[:, -1])
        with torch.inference_mode(False):  # what is made in inference mode cannot be sent
            return torch.stack([row.clone() for row in rows])

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

    def sizes(self) -> dict[str, float]:
        """MiB of the tensors of the model, and by how much the peak so far is above what was held before answering.

        Raises:
            RuntimeError: the system keeps no such mark.
        """
        if not self.measures_itself:
            raise RuntimeError("this system does not let a process set the mark of its peak memory back")
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors()}
        above = (peak_rss_bytes() or 0) - self.held
        return {"weights_mib": sum(storages.values()) / 2**20, "above_mib": above / 2**20}

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]


def agree(cases: Sequence[str], **arguments: Any) -> None:
    """Refuse to time wrong answers: all adapted models give the same logits, and not those of the base."""
    logits = {}
    for case in dict.fromkeys((*cases, BASE, PEFT_LORA)):
        contender = Contender(case, Answers, case=case, exact=True, **arguments)
        logits[case] = contender("logits")
        contender.close()
    expected = logits[PEFT_LORA]
    errors = {name: float((found - expected).norm() / expected.norm()) for name, found in logits.items()}
    emit(benchmark=NAME, check=f"logits against {PEFT_LORA}, float32", errors=errors)
    wrong = [name for name, error in errors.items() if name != BASE and not error <= 1e-4]
    if wrong or not errors[BASE] >= 1e-3:
        raise SystemExit(
            f"Nothing was timed: {', '.join(wrong) or 'the adapters'} {'disagree' if wrong else 'do nothing'}."
        )


def table(
    model: str, seconds: Mapping[str, Mapping[str, float]], sizes: Mapping[str, Mapping[str, float]], tokens: int
) -> str:
    """Markdown: a row for prefill, a token, the whole answer, and what is held; a column a contender."""
    names = list(seconds["prefill"])
    whole = {name: seconds["prefill"][name] + tokens * seconds["decode"][name] for name in names}
    parts = {"prefill": seconds["prefill"], "a token": seconds["decode"], f"prefill and {tokens} tokens": whole}
    rows = {f"{words}, s": [f"{found[name]:.4f}" for name in names] for words, found in parts.items()}
    if BASE in names:
        rows |= {f"{words} / base": [f"{found[n] / found[BASE]:.2f}" for n in names] for words, found in parts.items()}
    rows["weights and adapter, MiB"] = [f"{sizes[name]['weights_mib']:,.2f}" for name in names]
    rows["peak above these, MiB"] = [f"{sizes[name]['above_mib']:,.0f}" for name in names]
    lines = [f"| {model} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    return "\n".join([*lines, *(f"| {words} | " + " | ".join(cells) + " |" for words, cells in rows.items())])


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Checked before anything loads; what is wrong ends the program with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(KNOWN), default=SMOLLM2)
    parser.add_argument("--targets", nargs="+", default=["all-linear"], help="of the adapter")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="timed, in this order")
    parser.add_argument("--rows", type=positive, default=4, help="prompts in the batch")
    parser.add_argument("--length", type=positive, default=256, help="tokens of a prompt")
    parser.add_argument("--tokens", type=positive, default=32, help="tokens added to each")
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=THREADS)
    arguments = parser.parse_args(words)
    whole, longest = arguments.length + arguments.tokens, KNOWN[arguments.model]
    if whole > longest:
        parser.error(f"--length and --tokens together are {whole} positions, the model has {longest}: give fewer")
    if twice := sorted({case for case in arguments.cases if arguments.cases.count(case) > 1}):
        parser.error(f"--cases names {', '.join(twice)} more than once: each is timed once")
    return arguments


def main() -> None:
    arguments = read_arguments()
    size = {"rows": arguments.rows, "length": arguments.length, "tokens": arguments.tokens}
    targets = "all-linear" if arguments.targets == ["all-linear"] else arguments.targets
    made = {"model": arguments.model, "targets": targets, "threads": arguments.threads, **size}
    agree(arguments.cases, **made)
    contenders = {case: Contender(case, Answers, case=case, **made) for case in arguments.cases}
    seconds: dict[str, dict[str, float]] = {}
    for part in ("prefill", "decode"):
        taken = interleave(list(contenders.values()), part, arguments.repeats)
        s = seconds[part] = {case: median(values) for case, values in taken.items()}
        for case, values in taken.items():
            emit(benchmark=NAME, part=part, case=case, seconds=round(s[case], 5),
                 all_seconds=[round(value, 5) for value in values], **made)  # fmt: skip
        for one, other, wanted in WANTED:
            if {one, other} <= {*s}:
                verdict(NAME, f"{part}, {one} / {other}", s[one] / s[other], wanted)
        for case in (LORA, LORA_FA, PEFT_LORA):
            if {case, BASE} <= {*s}:
                verdict(NAME, f"{part}, {case} / base, as claimed", s[case] / s[BASE], CLAIMED)
    sizes = {case: contender("sizes") for case, contender in contenders.items()}
    for case, found in sizes.items():
        emit(benchmark=NAME, case=case, **{name: round(value, 2) for name, value in found.items()}, **made)
    print(table(arguments.model, seconds, sizes, arguments.tokens), file=sys.stderr)
    for contender in contenders.values():
        contender.close()


if __name__ == "__main__":
    main()
