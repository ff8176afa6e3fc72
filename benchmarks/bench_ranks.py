"""What LoRA and LoRA-FA cost over ranks: parameters, file, bytes kept for backward, peak memory, time of a step.

    python benchmarks/bench_ranks.py [--ranks 8 16 ...] [--rows 8] [--length 256] [--repeats 5]

SmolLM2-135M in bfloat16, all linear layers, no dropout, a batch of random tokens of which all are trained; a step is
forward, backward and the optimizer, AdamW for LoRA and lorafa's own for LoRA-FA. Both take turns at each rank. Bytes
are exact. A table for reading goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from harness import THREADS, Contender, emit, interleave, median, timed, verdict

NAME = "ranks"
LORA, LORA_FA = "LoRA", "LoRA-FA"
RANKS = (8, 16, 32, 64, 128, 256)


class Step:
    """One model with one adapter, its optimizer and one batch."""

    def __init__(self, method: str, rank: int, rows: int, length: int) -> None:
        import lorafa
        from lorafa.models.load import load_model

        torch.manual_seed(0)
        model, _ = load_model("smollm2-135m", dtype=torch.bfloat16, attention="sdpa")
        model.config.use_cache = False
        config = lorafa.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", freeze_A=method == LORA_FA)
        self.model = lorafa.get_peft_model(model, config).train()
        ids = torch.randint(model.config.vocab_size, (rows, length))
        self.batch = {"input_ids": ids, "labels": ids}
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if method == LORA_FA:
            self.optimizer: Any = lorafa.create_lorafa_optimizer(self.model, r=rank, lora_alpha=rank, lr=1e-3)
        else:
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)

    def forward(self) -> torch.Tensor:
        from lorafa.models.head_loss import supervised_loss

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
            self.forward().backward()
        self.optimizer.zero_grad(set_to_none=True)
        return sum(storages.values())

    def state(self) -> int:
        """Bytes of the optimizer's state, which is there after the first step."""
        tensors = [one for state in self.optimizer.state.values() for one in state.values()]
        return sum(one.nbytes for one in tensors if isinstance(one, torch.Tensor))

    def parameters(self) -> int:
        return sum(p.numel() for p in self.trained)


def at_rank(rank: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The figures of both methods at a rank."""
    size = {"rank": rank, "rows": arguments.rows, "length": arguments.length}
    both = [Contender(name, Step, threads=arguments.threads, method=name, **size) for name in (LORA, LORA_FA)]
    kept = {contender.name: contender("kept") for contender in both}
    taken = interleave(both, "step", arguments.repeats)
    found = {}
    for contender in both:
        found[contender.name] = {
            "parameters": contender("parameters"), "kept_mib": kept[contender.name] / 2**20,
            "state_mib": contender("state") / 2**20, "peak_mib": contender.peak_mib(),
            "seconds": median(taken[contender.name]),
        }  # fmt: skip
        emit(benchmark=NAME, rank=rank, case=contender.name,
             **{name: round(value, 3) for name, value in found[contender.name].items()},
             all_seconds=[round(value, 3) for value in taken[contender.name]])  # fmt: skip
        contender.close()
    return found


def table(found: dict[int, dict[str, dict[str, float]]]) -> str:
    """Markdown: a row for each rank, LoRA and LoRA-FA beside each other."""
    names = ("parameters", "kept_mib", "state_mib", "peak_mib", "seconds")
    lines = ["| r | " + " | ".join(f"{name}: LoRA, LoRA-FA" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for rank, both in found.items():
        pairs = (tuple(both[method][name] for method in (LORA, LORA_FA)) for name in names)
        cells = (f"{one:,.4g}, {other:,.4g}" for one, other in pairs)
        lines.append(f"| {rank} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS)
    arguments = parser.parse_args()
    found = {rank: at_rank(rank, arguments) for rank in arguments.ranks}
    for rank, both in found.items():
        for name, claim in (("peak_mib", 0.60), ("kept_mib", 0.60), ("seconds", 1.05)):
            ratio = both[LORA_FA][name] / both[LORA][name]
            verdict(NAME, f"r={rank}, {name}, LoRA-FA / LoRA, as claimed", ratio, claim)
    low, high = min(found), max(found)
    for method in (LORA, LORA_FA):
        growth = found[high][method]["kept_mib"] / found[low][method]["kept_mib"]
        emit(benchmark=NAME, figure=f"kept for backward, {method}, r={high} / r={low}", value=round(growth, 3))
    print(table(found), file=sys.stderr)


if __name__ == "__main__":
    main()
