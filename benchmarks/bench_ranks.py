"""What LoRA and LoRA-FA cost over ranks: parameters, optimizer state, bytes kept for backward, peak memory, time.

    python benchmarks/bench_ranks.py [--ranks 8 16 ...] [--library peft] [--rows 8] [--length 256] [--repeats 5]

SmolLM2-135M in bfloat16, all linear layers, no dropout, a batch of random tokens of which all are trained; a step is
forward, backward and the optimizer, AdamW for LoRA and the library's own for LoRA-FA. lorafa sends its tokens through
the head in chunks, PEFT computes the model's loss. Both methods take turns at each rank. All but the seconds is the
same on a busy machine. A table for reading goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from harness import THREADS, Contender, emit, interleave, median, positive, timed, verdict

from lorafa.runs.peaks import RUN, Peaks, peak_rss_bytes
from lorafa.train.memory import return_freed_memory

NAME = "ranks"
LORA, LORA_FA = "LoRA", "LoRA-FA"
RANKS = (8, 16, 32, 64, 128, 256)
CLAIMS = {"state_mib": 0.50, "kept_mib": 0.60, "above_mib": 0.60, "peak_mib": 0.60, "seconds": 1.05}
"""Of LoRA-FA as a share of LoRA, as a document on PEFT's optimizer has them; docs/claims.md says what came out."""


class Step:
    """One model with one adapter, its optimizer and one batch."""

    def __init__(self, library: str, method: str, rank: int, rows: int, length: int) -> None:
        from lorafa.models.load import load_model

        torch.manual_seed(0)
        model, _ = load_model("smollm2-135m", dtype=torch.bfloat16, attention="sdpa")
        model.config.use_cache = False
        self.library = library
        self.model = self._adapted(model, method, rank).train()
        ids = torch.randint(model.config.vocab_size, (rows, length))
        self.batch = {"input_ids": ids, "labels": ids}
        if method == LORA_FA:
            self.optimizer: Any = self._lora_fa(r=rank, lora_alpha=rank, lr=1e-3)
        else:
            self.optimizer = torch.optim.AdamW(self._trained(), lr=1e-3)
        return_freed_memory()
        self.measures_itself = Peaks().scope == RUN
        self.held = peak_rss_bytes() or 0

    def _adapted(self, model: Any, method: str, rank: int) -> Any:
        settings: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
        if self.library == "peft":
            import peft

            return peft.get_peft_model(model, peft.LoraConfig(**settings))
        import lorafa

        return lorafa.get_peft_model(model, lorafa.LoraConfig(**settings, freeze_A=method == LORA_FA))

    def _lora_fa(self, **settings: Any) -> Any:
        if self.library == "peft":
            from peft.optimizers import create_lorafa_optimizer
        else:
            from lorafa.optimizers import create_lorafa_optimizer
        return create_lorafa_optimizer(self.model, **settings)

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def forward(self) -> torch.Tensor:
        from lorafa.models.head_loss import supervised_loss

        if self.library == "peft":
            return self.model(**self.batch).loss  # type: ignore[no-any-return]
        return supervised_loss(self.model, self.batch)

    def step(self) -> float:
        def run() -> None:
            self.forward().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        return timed(run)

    def kept(self) -> int:
        """Bytes that a forward pass keeps for backward, each storage once, parameters apart."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        storages: dict[int, int] = {}
        alive: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.forward()
        kept = sum(storages.values())
        del loss  # all was kept for it
        return kept

    def state(self) -> int:
        """Bytes of the optimizer's state, which is there after the first step."""
        tensors = [one for state in self.optimizer.state.values() for one in state.values()]
        return sum(one.nbytes for one in tensors if isinstance(one, torch.Tensor))

    def above(self) -> float:
        """MiB by which the peak so far is above what the process held with the model, before the first step.

        Raises:
            RuntimeError: the system keeps no such mark.
        """
        if not self.measures_itself:
            raise RuntimeError("this system does not let a process set the mark of its peak memory back")
        return ((peak_rss_bytes() or 0) - self.held) / 2**20

    def parameters(self) -> int:
        return sum(p.numel() for p in self._trained())


def at_rank(rank: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The figures of both methods at a rank."""
    size = {"library": arguments.library, "rank": rank, "rows": arguments.rows, "length": arguments.length}
    both = [Contender(name, Step, threads=arguments.threads, method=name, **size) for name in (LORA, LORA_FA)]
    taken = interleave(both, "step", arguments.repeats)
    found = {}
    for contender in both:
        found[contender.name] = {
            "parameters": contender("parameters"), "state_mib": contender("state") / 2**20,
            # The peaks come before the kept bytes: what counts those holds on to every tensor it sees.
            "above_mib": contender("above"), "peak_mib": contender.peak_mib(),
            "kept_mib": contender("kept") / 2**20, "seconds": median(taken[contender.name]),
        }  # fmt: skip
        emit(benchmark=NAME, library=arguments.library, rank=rank, case=contender.name,
             **{name: round(value, 3) for name, value in found[contender.name].items()},
             all_seconds=[round(value, 3) for value in taken[contender.name]])  # fmt: skip
        contender.close()
    return found


COLUMNS = {
    "parameters": ("trained parameters", "{:,.0f}"), "state_mib": ("optimizer state, MiB", "{:,.1f}"),
    "kept_mib": ("kept for backward, MiB", "{:,.0f}"), "above_mib": ("peak above the model, MiB", "{:,.0f}"),
    "peak_mib": ("peak of the process, MiB", "{:,.0f}"), "seconds": ("a step, s", "{:.2f}"),
}  # fmt: skip


def table(found: dict[int, dict[str, dict[str, float]]]) -> str:
    """Markdown: a row for each rank, LoRA, LoRA-FA and what the second is of the first."""
    lines = ["| r | " + " | ".join(words for words, _ in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for rank, both in found.items():
        cells = []
        for name, (_, form) in COLUMNS.items():
            one, other = both[LORA][name], both[LORA_FA][name]
            cells.append(f"{form.format(one)} / {form.format(other)}, {other / one:.2f}")
        lines.append(f"| {rank} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Checked before anything loads; what is wrong ends the program with status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=positive, nargs="+", default=RANKS)
    parser.add_argument("--library", choices=["lorafa", "peft"], default="lorafa")
    parser.add_argument("--rows", type=positive, default=8)
    parser.add_argument("--length", type=positive, default=256)
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=THREADS)
    return parser.parse_args(words)


def main() -> None:
    arguments = read_arguments()
    found = {rank: at_rank(rank, arguments) for rank in arguments.ranks}
    for rank, both in found.items():
        for name, claim in CLAIMS.items():
            share = both[LORA_FA][name] / both[LORA][name]
            verdict(NAME, f"r={rank}, {name}, LoRA-FA / LoRA, as claimed", share, claim)
    low, high = min(found), max(found)
    for method in (LORA, LORA_FA):
        for name in ("kept_mib", "above_mib", "peak_mib"):
            growth = found[high][method][name] / found[low][method][name]
            emit(benchmark=NAME, figure=f"{name}, {method}, r={high} / r={low}", value=round(growth, 3))
    print(table(found), file=sys.stderr)


if __name__ == "__main__":
    main()
