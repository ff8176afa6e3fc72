"""Bytes kept for backward, peak memory and time of one training step, lorafa against PEFT on SmolLM2-135M.

    python benchmarks/bench_training_step.py [--data gsm8k_train.jsonl] [--repeats 5]

bfloat16, all linear layers, r = 16, dropout 0.05, a batch of 8 problems with the answers supervised, forward and
backward. Losses and gradients are compared first, in float32 with dropout off. "model's loss" is transformers' own,
"our loss" sends only supervised positions through the head.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from harness import THREADS, Contender, emit, interleave, median, timed, verdict

NAME = "training_step"
ROWS = 8
CHECKED_ROWS = 2


def batch(data: str, tokenizer: Any) -> dict[str, torch.Tensor]:
    from lorafa.data.chat import encode_all
    from lorafa.data.collate import Collator
    from lorafa.data.sources import load_records

    records = load_records(data, train_size=ROWS, eval_size=0, seed=0).train
    samples = encode_all(records, tokenizer, 1024).samples
    return dict(Collator(tokenizer.pad_token_id or 0)(samples))


class Step:
    """One model and one batch."""

    def __init__(self, library: str, loss: str, data: str, dropout: float = 0.05, dora: bool = False,
                 freeze_A: bool = False) -> None:  # fmt: skip
        from lorafa.models.load import load_model

        torch.manual_seed(0)
        model, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16, attention="sdpa")
        model.config.use_cache = False
        self.batch = batch(data, tokenizer)
        self.loss = loss
        settings: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": dropout, "use_dora": dora}
        settings |= {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        if library == "peft":
            import peft

            model = peft.get_peft_model(model, peft.LoraConfig(**settings))
        elif library == "lorafa":
            import lorafa

            model = lorafa.get_peft_model(model, lorafa.LoraConfig(**settings))
        else:
            model.requires_grad_(False)
            model.enable_input_require_grads()
        self.model = model.train()
        for index, (name, parameter) in enumerate(sorted(self.factors().items())):
            generator = torch.Generator().manual_seed(index)
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            if freeze_A and "lora_A" in name:
                parameter.requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            path, found, _ = name.partition(".lora_magnitude_vector")
            if found:  # PEFT rounds them to bfloat16 when it makes them
                weight = self.model.get_submodule(path).get_base_layer().weight
                parameter.data = weight.float().norm(dim=1).view(parameter.shape)

    def factors(self) -> dict[str, torch.nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if "lora_A" in n or "lora_B" in n}

    def forward(self) -> torch.Tensor:
        if self.loss == "chunked":
            from lorafa.models.head_loss import supervised_loss

            return supervised_loss(self.model, self.batch)
        return self.model(**self.batch).loss

    def step(self) -> float:
        def run() -> None:
            self.forward().backward()

        seconds = timed(run)
        self.model.zero_grad(set_to_none=True)
        return seconds

    def check(self) -> tuple[float, list[torch.Tensor]]:
        """Loss and gradients of the first rows in float32, with dropout off."""
        whole, dtypes = self.batch, {parameter: parameter.dtype for parameter in self.model.parameters()}
        self.batch = {name: values[:CHECKED_ROWS] for name, values in whole.items()}
        for parameter in dtypes:
            parameter.data = parameter.data.float()
        self.model.eval()
        loss = self.forward()
        loss.backward()
        grads = [p.grad.clone() for _, p in sorted(self.factors().items()) if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        self.model.train()
        for parameter, dtype in dtypes.items():  # exact for the base: it was widened
            parameter.data = parameter.data.to(dtype)
        self.batch = whole
        return float(loss.detach()), grads

    def saved_bytes(self) -> int:
        """Bytes kept for backward, each storage once, parameters apart."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no address is used twice
            return tensor

        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward().backward()
        self.model.zero_grad(set_to_none=True)
        return sum(storages.values())


def agree(one: Contender, other: Contender, loss_error: float = 1e-5, gradient_error: float = 1e-3) -> None:
    """Refuse to time wrong answers: loss and every factor's gradient, in float32."""
    (loss, grads), (other_loss, other_grads) = one("check"), other("check")
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(grads, other_grads, strict=True))
    emit(benchmark=NAME, check=f"{one.name} = {other.name}", loss=loss, other_loss=other_loss, gradient_error=error)
    if abs(loss - other_loss) > loss_error * abs(other_loss) or error > gradient_error:
        raise SystemExit(f"{one.name} and {other.name} disagree: nothing was timed.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="word_problems", help="a jsonl of question/answer rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--only", choices=["lora", "lora_fa", "dora"], help="one part of the benchmark")
    arguments = parser.parse_args()
    data = str(Path(arguments.data).resolve()) if Path(arguments.data).exists() else arguments.data
    if arguments.only in (None, "lora"):
        lora(data, arguments.repeats, arguments.threads)
    if arguments.only in (None, "lora_fa"):
        lora_fa(data, arguments.threads)
    if arguments.only in (None, "dora"):
        dora(data, arguments.repeats, arguments.threads)


def compare(one: Contender, other: Contender, repeats: int) -> dict[str, dict[str, float]]:
    """Bytes kept, peak memory and median seconds of two contenders that agree."""
    agree(one, other)
    both = [one, other]
    size = {c.name: c("saved_bytes") for c in both}
    taken = interleave(both, "step", repeats)
    figures = {}
    for c in both:
        seconds = median(taken[c.name])
        figures[c.name] = {"saved_mib": size[c.name] / 2**20, "peak_mib": c.peak_mib(), "seconds": seconds}
        emit(benchmark=NAME, case=c.name, **{key: round(value, 3) for key, value in figures[c.name].items()},
             all_seconds=[round(value, 3) for value in taken[c.name]])  # fmt: skip
        c.close()
    return figures


def lora(data: str, repeats: int, threads: int) -> None:
    """One pair at a time: all of them together do not fit into memory."""

    def contender(name: str, library: str, loss: str, **more: Any) -> Contender:
        return Contender(name, Step, threads=threads, library=library, loss=loss, data=data, **more)

    f = compare(contender("lorafa", "lorafa", "chunked"), contender("peft", "peft", "model"), repeats)
    ours, peft = f["lorafa"], f["peft"]
    verdict(NAME, "saved bytes, our loss / PEFT", ours["saved_mib"] / peft["saved_mib"], 0.35)
    verdict(NAME, "peak memory, our loss / PEFT", ours["peak_mib"] / peft["peak_mib"], 0.40)
    verdict(NAME, "time, our loss / PEFT", ours["seconds"] / peft["seconds"], 0.65)
    f = compare(contender("lorafa", "lorafa", "model"), contender("peft", "peft", "model"), repeats)
    verdict(NAME, "saved bytes, model's loss / PEFT", f["lorafa"]["saved_mib"] / f["peft"]["saved_mib"], 0.60)
    verdict(NAME, "time, model's loss / PEFT", f["lorafa"]["seconds"] / f["peft"]["seconds"], 0.90)
    lorafa, base = contender("lorafa", "lorafa", "model"), contender("frozen base", "base", "model")
    taken = {name: median(values) for name, values in interleave([lorafa, base], "step", repeats).items()}
    verdict(NAME, "time, model's loss / frozen base", taken["lorafa"] / taken["frozen base"], 1.10, seconds=taken)
    base.close()
    lorafa.close()


def lora_fa(data: str, threads: int) -> None:
    """Bytes alone: they are exact. With a frozen A."""
    saved = {}
    for library, loss, freeze_A in (("lorafa", "chunked", False), ("lorafa", "chunked", True), ("peft", "model", True)):
        name = f"{library}, A {'frozen' if freeze_A else 'trained'}"
        step = Contender(name, Step, threads=threads, library=library, loss=loss, data=data, freeze_A=freeze_A)
        saved[library, freeze_A] = step("saved_bytes")
        step.close()
        emit(benchmark=NAME, case=name, saved_mib=round(saved[library, freeze_A] / 2**20, 1))
    ours = saved["lorafa", True]
    verdict(NAME, "saved bytes, LoRA-FA / our LoRA", ours / saved["lorafa", False], 0.85)
    verdict(NAME, "saved bytes, LoRA-FA, our loss / PEFT's LoRA-FA", ours / saved["peft", True], 0.40)


def dora(data: str, repeats: int, threads: int) -> None:
    def contender(name: str, library: str, dropout: float, dora: bool = True) -> Contender:
        make: dict[str, Any] = {"loss": "model", "data": data, "dropout": dropout, "dora": dora}
        return Contender(name, Step, threads=threads, library=library, **make)

    for dropout in (0.0, 0.05):
        both = [contender("lorafa DoRA", "lorafa", dropout), contender("lorafa LoRA", "lorafa", dropout, dora=False)]
        taken = {name: median(values) for name, values in interleave(both, "step", repeats).items()}
        time = taken["lorafa DoRA"] / taken["lorafa LoRA"]
        verdict(NAME, "DoRA time / our LoRA", time, 1.15, dropout=dropout, seconds=taken)
        for each in both:
            each.close()
    # With dropout PEFT's DoRA computes the base product twice and does not fit into 23 GB.
    f = compare(contender("lorafa DoRA", "lorafa", 0.0), contender("peft DoRA", "peft", 0.0), repeats)
    one, other = f["lorafa DoRA"], f["peft DoRA"]
    verdict(NAME, "DoRA saved bytes / PEFT's DoRA", one["saved_mib"] / other["saved_mib"], 0.50)
    verdict(NAME, "DoRA time / PEFT's DoRA", one["seconds"] / other["seconds"], 1.0)


if __name__ == "__main__":
    main()
