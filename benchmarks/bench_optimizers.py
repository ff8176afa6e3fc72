"""How long is one step of each optimizer on all 210 linears of SmolLM2-135M, lorafa against PEFT and torch?

    python benchmarks/bench_optimizers.py [--repeats 15] [--threads 2] [--only lora_fa together]

The gradients are fixed random numbers, equal in all contenders. First, thirty steps of LoRA-FA are compared with
PEFT's. PEFT's optimizer computes under bfloat16 autocast; that is turned off for the comparison and on for the timing.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from harness import THREADS, Contender, emit, interleave, median, timed, verdict

NAME = "optimizers"
LR = 1e-4
IN_A_ROW = 5
PARTS = ["lora_fa", "lora_fa at rank 64", "together"]


class Steps:
    """An adapted model with gradients in place; the model is never run."""

    def __init__(self, library: str, optimizer: str, rank: int, without_autocast: bool = False) -> None:
        from lorafa.models.load import load_model

        model, _ = load_model("smollm2-135m", dtype=torch.bfloat16, attention="sdpa")
        settings: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
        settings["task_type"] = "CAUSAL_LM"
        if library == "peft":
            import peft

            self.model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        else:
            import lorafa

            self.model = lorafa.get_peft_model(model, lorafa.LoraConfig(**settings))
        self.factors = {n: p for n, p in sorted(self.model.named_parameters()) if "lora_A" in n or "lora_B" in n}
        for index, (name, parameter) in enumerate(self.factors.items()):
            generator = torch.Generator().manual_seed(index)
            size = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.01
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
        self.optimizer = self._make(optimizer, rank, without_autocast)
        for index, parameter in enumerate(self.factors.values()):
            generator = torch.Generator().manual_seed(1000 + index)
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.gradients = {p: p.grad for p in self.factors.values() if p.grad is not None}

    def _make(self, name: str, rank: int, without_autocast: bool) -> torch.optim.Optimizer:
        from lorafa import optimizers

        Bs = [p for n, p in self.factors.items() if "lora_B" in n]
        fa: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "lr": LR}
        if name == "peft lora_fa":
            import peft.optimizers.lorafa as theirs

            if without_autocast:
                theirs.is_bf16_available = lambda: False
            return theirs.create_lorafa_optimizer(self.model, **fa)
        if name == "adamw on B":
            for n, parameter in self.factors.items():
                parameter.requires_grad_("lora_B" in n)
            return torch.optim.AdamW(Bs, lr=LR, fused=True)
        makers: dict[str, Any] = {
            "exact": lambda: optimizers.create_lorafa_optimizer(self.model, **fa),
            "fold": lambda: optimizers.create_lorafa_optimizer(self.model, **fa, algorithm="fold"),
            "adamw": lambda: torch.optim.AdamW(list(self.factors.values()), lr=LR, fused=True),
            "riemannian": lambda: optimizers.create_riemannian_optimizer(
                self.model, torch.optim.AdamW, lr=LR, fused=True
            ),
            "preconditioned": lambda: optimizers.create_preconditioned_adamw(self.model, lr=LR),
        } | {
            f"lora_pro {X}": lambda X=X: optimizers.create_lorapro_optimizer(self.model, lr=LR, X=X)
            for X in ("zero", "symmetric", "sylvester")
        }
        made: torch.optim.Optimizer = makers[name]()
        return made

    def step(self) -> float:
        """Seconds a step takes, mean of a few in a row."""
        seconds = 0.0
        for _ in range(IN_A_ROW):
            for parameter, gradient in self.gradients.items():
                parameter.grad = gradient  # preconditioners put others in their place
            seconds += timed(self.optimizer.step)
        return seconds / IN_A_ROW

    def steps(self, count: int) -> list[torch.Tensor]:
        """B of every layer after more steps, each with other gradients."""
        for index in range(count):
            for parameter, gradient in self.gradients.items():
                parameter.grad = gradient.roll(index, 0)
            self.optimizer.step()
        return [p.detach().clone() for n, p in self.factors.items() if "lora_B" in n]


def lora_fa(rank: int, repeats: int, threads: int, of_exact: float) -> None:
    def contender(name: str, library: str, **more: Any) -> Contender:
        return Contender(name, Steps, threads=threads, library=library, optimizer=name, rank=rank, **more)

    exact = contender("exact", "lorafa")
    plain = contender("peft lora_fa", "peft", without_autocast=True)
    pairs = zip(exact("steps", 30), plain("steps", 30), strict=True)
    error = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    plain.close()
    emit(benchmark=NAME, rank=rank, check="30 steps of exact = PEFT's without its autocast", error=error)
    if error > (1e-6 if rank <= 16 else 5e-6):  # PEFT inverts in float32, which larger ranks condition worse
        raise SystemExit("They disagree: nothing was timed.")
    contenders = [
        exact,
        contender("fold", "lorafa"),
        contender("adamw on B", "lorafa"),
        contender("peft lora_fa", "peft"),
    ]
    taken = {name: median(values) for name, values in interleave(contenders, "step", repeats).items()}
    emit(benchmark=NAME, rank=rank, milliseconds={name: round(1e3 * value, 2) for name, value in taken.items()})
    verdict(NAME, f"exact / PEFT's LoRA-FA, r={rank}", taken["exact"] / taken["peft lora_fa"], of_exact)
    verdict(NAME, f"fold / fused AdamW on the same B, r={rank}", taken["fold"] / taken["adamw on B"], 1.15)
    for each in contenders:
        each.close()


def together(repeats: int, threads: int) -> None:
    names = ["adamw", "riemannian", "preconditioned", "lora_pro zero", "lora_pro symmetric", "lora_pro sylvester"]
    contenders = [Contender(n, Steps, threads=threads, library="lorafa", optimizer=n, rank=16) for n in names]
    taken = {name: median(values) for name, values in interleave(contenders, "step", repeats).items()}
    emit(benchmark=NAME, rank=16, milliseconds={name: round(1e3 * value, 2) for name, value in taken.items()})
    for name in names[1:]:
        verdict(NAME, f"{name} / fused AdamW on A and B, r=16", taken[name] / taken["adamw"], 3.0)
    for each in contenders:
        each.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    if "lora_fa" in arguments.only:
        lora_fa(16, arguments.repeats, arguments.threads, 1 / 12)
    if "lora_fa at rank 64" in arguments.only:
        lora_fa(64, arguments.repeats, arguments.threads, 1 / 6)
    if "together" in arguments.only:
        together(arguments.repeats, arguments.threads)


if __name__ == "__main__":
    main()
