"""Bytes kept for backward and time of one training step of each variant, lorafa against PEFT on SmolLM2-135M.

    python benchmarks/bench_variants.py [--data gsm8k_train.jsonl] [--repeats 5] [--rows 4] [--only dora kasa ...]

bfloat16, all linear layers, r = 16, dropout 0.05 where the variant takes one, the model's own loss in both, forward and
backward. Losses and gradients are compared first, in float32 with dropout and noise off. Bytes are those beyond what
the frozen base alone keeps. "nf4" is plain LoRA on a base of bitsandbytes' 4-bit layers; "arrow" routes among 8 experts
and is inference.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from pathlib import Path
from typing import Any

import torch
from bench_training_step import Step, agree, batch
from harness import THREADS, Contender, emit, interleave, median, positive, timed, verdict

NAME = "variants"
EXPERTS = 8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INVOCATION = [1, 520, 9531, 198]
"""How SmolLM2's template begins an answer."""
VARIANTS = ("lora", "dora", "alora", "kasa", "bdlora", "velora", "monteclora", "nf4")
TIME, BYTES = 0.8, 0.4
TARGETS = {"velora": (TIME, 1.0), "nf4": (0.9, 0.5)}
"""Variant -> the most that its time and its bytes may be of PEFT's, where that is not as for all."""
IN_FLOAT32 = {"nf4": (1e-5, 1e-3), "kasa": (1e-4, 1e-2)}
"""Variants that are compared on a base loaded in float32, with how far loss and gradients may differ: codes have no
other numbers, and PEFT writes the base of KaSA in its own dtype. What is left of SmolLM2 without its smallest singular
values computes nothing like it, and every rounding shows."""


def settings_of(variant: str, library: Any) -> dict[str, Any]:
    """What a LoraConfig of either library needs for a variant."""
    sharded = {"target_modules_bd_a": ["o_proj", "down_proj"], "nblocks": 2}
    sharded["target_modules_bd_b"] = [name for name in LINEAR if name not in sharded["target_modules_bd_a"]]
    own: dict[str, Any] = {
        "dora": lambda: {"use_dora": True},
        "alora": lambda: {"alora_invocation_tokens": INVOCATION},
        "kasa": lambda: {"kasa_config": library.KasaConfig(), "lora_dropout": 0.0},
        "bdlora": lambda: {"use_bdlora": library.BdLoraConfig(**sharded)},
        "velora": lambda: {"velora_config": library.VeloraConfig(num_groups=64)},
        "monteclora": lambda: {"monteclora_config": library.MontecloraConfig()},
    }
    return own[variant]() if variant in own else {}


class VariantStep(Step):
    """One model with a variant, and one batch."""

    def __init__(self, library: str, variant: str, data: str, rows: int, in_float32: bool = False) -> None:
        from lorafa.models.load import load_model

        torch.manual_seed(0)
        dtype = torch.float32 if in_float32 else torch.bfloat16
        model, tokenizer = load_model("smollm2-135m", dtype=dtype, attention="sdpa")
        model.config.use_cache = False
        model.requires_grad_(False)
        self.batch, self.loss = {name: values[:rows] for name, values in batch(data, tokenizer).items()}, "model"
        if variant == "nf4":
            from lorafa.models.quantize import quantize_linears

            quantize_linears(model, "bnb4")
        self.widens = not in_float32
        if library == "base":
            model.enable_input_require_grads()
            self.model = model.train()
            return
        module: Any = __import__(library)
        settings = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
        config = module.LoraConfig(**(settings | settings_of(variant, module)))
        self.model = module.get_peft_model(model, config).train()
        for name, parameter in self.factors().items():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
            path = name.partition(".lora_magnitude_vector")[0]
            if path != name:  # PEFT rounds them to bfloat16 when it makes them
                weight = self.model.get_submodule(path).get_base_layer().weight
                parameter.data = weight.float().norm(dim=1).view(parameter.shape)

    def factors(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by names that are the same in both libraries."""
        return {name.removesuffix(".weight"): p for name, p in self.model.named_parameters() if p.requires_grad}

    def check(self) -> tuple[float, list[torch.Tensor]]:
        if self.widens:
            return super().check()
        self.model.eval()
        loss = self.forward()
        loss.backward()
        grads = [p.grad.clone() for _, p in sorted(self.factors().items()) if p.grad is not None]
        self.model.zero_grad(set_to_none=True)
        self.model.train()
        return float(loss.detach()), grads


class Routed:
    """Eight experts on SmolLM2-135M, routed by Arrow; a step reads 4 x 256 tokens."""

    def __init__(self, library: str, folders: list[str]) -> None:
        from lorafa.models.load import load_model

        torch.manual_seed(0)
        model, _ = load_model("smollm2-135m", dtype=torch.bfloat16, attention="sdpa")
        module: Any = __import__(library)
        config = module.ArrowConfig(top_k=3, rng_seed=0)
        self.model = module.create_arrow_model(model, folders, config).eval()
        self.ids = torch.randint(100, 40000, (4, 256), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return self.model(input_ids=self.ids[:1]).logits.float()

    @torch.no_grad()
    def step(self) -> float:
        return timed(lambda: self.model(input_ids=self.ids))


def experts(folder: Path) -> list[str]:
    """Folders of plain adapters of rank 8, each with a direction of its own."""
    import lorafa
    from lorafa.models.load import load_model

    torch.manual_seed(0)
    model, _ = load_model("smollm2-135m", dtype=torch.bfloat16)
    made = []
    for number in range(EXPERTS):
        config = lorafa.LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM", init_seed=number)
        adapted = lorafa.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.01)
        adapted.save_pretrained(folder / str(number))
        made.append(str(folder / str(number)))
        model = adapted.unload()
    return made


def compare(variant: str, data: str, repeats: int, threads: int, rows: int) -> None:
    def contender(library: str, of: str = variant, **more: Any) -> Contender:
        make: dict[str, Any] = {"library": library, "variant": of, "data": data, "rows": rows, **more}
        return Contender(f"{library} {of}", VariantStep, threads=threads, **make)

    base = contender("base", "nf4" if variant == "nf4" else "lora")
    kept = base("saved_bytes")
    base.close()
    if variant in IN_FLOAT32:
        compared = [contender(library, rows=1, in_float32=True) for library in ("lorafa", "peft")]
        agree(*compared, *IN_FLOAT32[variant])
        for each in compared:
            each.close()
    both = [contender("lorafa"), contender("peft")]
    if variant not in IN_FLOAT32:
        agree(*both)
    sizes = {c.name: c("saved_bytes") - kept for c in both}
    taken = {name: median(values) for name, values in interleave(both, "step", repeats).items()}
    for each in both:
        each.close()
    ours, theirs = (c.name for c in both)
    figures = {name: {"mib_beyond_base": round(sizes[name] / 2**20, 1), "seconds": taken[name]} for name in sizes}
    emit(benchmark=NAME, case=variant, base_mib=round(kept / 2**20, 1), **figures)
    time, size = TARGETS.get(variant, (TIME, BYTES))
    verdict(NAME, f"{variant}: time / PEFT", taken[ours] / taken[theirs], time)
    verdict(NAME, f"{variant}: bytes beyond the base / PEFT", sizes[ours] / sizes[theirs], size)


def dora_beside_lora(data: str, repeats: int, threads: int, rows: int) -> None:
    make: dict[str, Any] = {"library": "lorafa", "data": data, "rows": rows}
    both = [Contender(f"lorafa {v}", VariantStep, threads=threads, variant=v, **make) for v in ("dora", "lora")]
    taken = {name: median(values) for name, values in interleave(both, "step", repeats).items()}
    for each in both:
        each.close()
    verdict(NAME, "dora with dropout: time / our LoRA", taken["lorafa dora"] / taken["lorafa lora"], 1.5, seconds=taken)


def arrow(repeats: int, threads: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folders = experts(Path(folder))
        make: dict[str, Any] = {"threads": threads, "folders": folders}
        both = [Contender(f"{library} arrow", Routed, library=library, **make) for library in ("lorafa", "peft")]
        one, other = (c("logits") for c in both)
        emit(benchmark=NAME, check="arrow", error=float((one - other).norm() / other.norm()))
        taken = {name: median(values) for name, values in interleave(both, "step", repeats).items()}
        for each in both:
            each.close()
    time = taken["lorafa arrow"] / taken["peft arrow"]
    verdict(NAME, "arrow with 8 experts: time a token / PEFT", time, 0.5, seconds=taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="word_problems", help="a jsonl of question/answer rows")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--rows", type=positive, default=4, help="of the batch, at most 8")
    parser.add_argument("--threads", type=positive, default=THREADS)
    parser.add_argument("--only", nargs="+", choices=[*VARIANTS, "arrow"], default=[*VARIANTS, "arrow"])
    arguments = parser.parse_args()
    data = str(Path(arguments.data).resolve()) if Path(arguments.data).exists() else arguments.data
    for variant in arguments.only:
        if variant == "arrow":
            arrow(arguments.repeats, arguments.threads)
            continue
        compare(variant, data, arguments.repeats, arguments.threads, arguments.rows)
        if variant == "dora":
            dora_beside_lora(data, arguments.repeats, arguments.threads, arguments.rows)


if __name__ == "__main__":
    main()
