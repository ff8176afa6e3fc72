"""What do data-aware starts cost on SmolLM2-135M, all 210 linears, lorafa against PEFT?

    python benchmarks/bench_starts.py --data gsm8k_train.jsonl [--rows 64] [--repeats 3] [--only gradient weights ...]

gradient: 64 rows, one at a time, bfloat16, rank 8. Bytes of the statistics against dense float32 gradients; the peak
above the model and the time, each in a fresh process, against PEFT's preprocess_loraga: of the rows, whose loss is
computed at labelled positions, and of the train_step PEFT is given, with the model's own loss; and the share of the
energy of each exact gradient's best eight directions (summed in float64 over the same rows) that the sketched ones
hold.
weights: seconds get_peft_model takes with starts computed from weights, and what pissa's triplets hold of the energy of
the exact ones.
inputs: seconds from the plain model to an adapter started by CorDA or EVA over the same rows, one at a time, float32,
rank 16; of CorDA also without those from the first to the last call of the model, which both libraries need alike, and
what its triplets hold of the energy of the exact ones.
paper: bytes of the sketches of larger models at rank 8, from shapes alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Contender, emit, interleave, median, verdict

NAME = "starts"
RANK = 8
WEIGHT_RANK = 16
TRAIN_STEP = "lorafa with PEFT's train_step"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows_of(path: str, count: int, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """Batches of one row each."""
    from lorafa.data.chat import encode_all
    from lorafa.data.collate import Collator
    from lorafa.data.records import Message, Record

    with Path(path).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    records = [Record((Message("user", row["question"]), Message("assistant", row["answer"]))) for row in rows]
    collator = Collator(tokenizer.pad_token_id or 0)
    return [dict(collator([sample])) for sample in encode_all(records, tokenizer, 1024).samples]


def held() -> float:
    """Resident memory now, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


class Gradients:
    """A model and rows; ``run`` collects gradients of them and throws them away."""

    def __init__(self, library: str, data: str, rows: int) -> None:
        from lorafa.models.load import load_model

        torch.manual_seed(0)
        self.model, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16, attention="sdpa")
        self.model.config.use_cache = False
        self.rows = rows_of(data, rows, tokenizer)
        self.library = library

    def _config(self, library: Any, **more: Any) -> Any:
        settings: dict[str, Any] = {"r": RANK, "lora_alpha": 16, "target_modules": LINEARS}
        return library.LoraConfig(**settings, task_type="CAUSAL_LM", init_lora_weights="lora_ga", **more)

    def _train_step(self) -> None:
        for row in self.rows:
            self.model(**row).loss.backward()

    def _peft(self) -> None:
        import peft

        config = self._config(peft, lora_ga_config=peft.LoraGAConfig())
        peft.preprocess_loraga(self.model, config, self._train_step)
        for module in self.model.modules():
            module.__dict__.pop("_peft_loraga_grad", None)

    def _lorafa(self, data: Any, **options: Any) -> Any:
        import lorafa

        return lorafa.collect_statistics(self.model, self._config(lorafa), data, **options)

    def peak(self) -> tuple[float, float]:
        """Peak memory of a run above the model, MiB, and the seconds for all rows."""
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading the model has freed would hide a part
        Path("/proc/self/clear_refs").write_text("5")
        before, start = held(), time.perf_counter()
        {
            "peft": self._peft,
            "lorafa": lambda: self._lorafa(self.rows),
            TRAIN_STEP: lambda: self._lorafa(self._train_step),
        }[self.library]()
        seconds = time.perf_counter() - start
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024 - before, seconds

    def captured(self) -> dict[str, dict[str, float]]:
        """Mean and smallest share over the layers, left and right, of one pass and of two with a power iteration."""
        exact = self._exact()
        found = {}
        for name, options in {"one pass": {}, "power iteration": {"passes": 4}}.items():
            stats = self._lorafa(self.rows, **options)
            shares = []
            for layer, G in exact.items():
                best = torch.linalg.svdvals(G)[:RANK].square().sum()
                U, Vh = (stats[layer][f"gradient.{side}"].double() for side in ("U", "Vh"))
                left, right = (U[:, :RANK].mT @ G).square().sum(), (G @ Vh[:RANK].mT).square().sum()
                shares.append([float(left / best), float(right / best)])
            table = torch.tensor(shares)
            found[name] = {
                "left": float(table[:, 0].mean()),
                "right": float(table[:, 1].mean()),
                "smallest": float(table.min()),
            }
        return found

    def _exact(self) -> dict[str, torch.Tensor]:
        from lorafa.calibration.base import Measured, Statistic
        from lorafa.calibration.batches import of_data
        from lorafa.calibration.collect import collect

        class Exact(Statistic):
            reads_gradient = True

            def __init__(self, layer: Measured) -> None:
                super().__init__(layer)
                self.G = torch.zeros(layer.out, layer.in_, dtype=torch.float64)

            def update(self, x: torch.Tensor, d: torch.Tensor | None) -> None:
                assert d is not None
                self.G.addmm_(d.double().mT, x.double())

            def result(self) -> dict[str, torch.Tensor]:
                return {"G": self.G}

        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
        named = {n: {"exact": Exact(Measured(n, m.out_features, m.in_features, RANK))} for n, m in layers.items()}

        found = collect(self.model, layers, named, of_data(self.model, self.rows))
        return {layer: tensors["exact.G"] for layer, tensors in found.items()}

    def bytes_of_statistics(self) -> tuple[int, int, int]:
        """Bytes of the accumulators, of what is kept of them, and of dense float32 gradients."""
        from lorafa.calibration.base import CalibrationOptions, Measured
        from lorafa.calibration.gradient import GradientSketch

        accumulators = dense = 0
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                layer = Measured(name, module.out_features, module.in_features, RANK, None, CalibrationOptions())
                accumulators += sketch_bytes(GradientSketch(layer))
                dense += 4 * module.weight.numel()
        return accumulators, self._lorafa(self.rows[:1]).nbytes, dense


def sketch_bytes(sketch: Any) -> int:
    """Bytes of the accumulators of a gradient statistic."""
    sketch.start_pass(0, {})
    return sum(tensor.nbytes for tensor in sketch.sums())


def gradient(data: str, rows: int, repeats: int) -> None:
    peaks: dict[str, list[float]] = {"lorafa": [], TRAIN_STEP: [], "peft": []}
    taken: dict[str, list[float]] = {name: [] for name in peaks}
    for turn in range(repeats):
        # in fresh processes: holes in a used heap count as memory, and kernels once made are kept
        for library in sorted(peaks, reverse=turn % 2 == 1):
            fresh = Contender(library, Gradients, library=library, data=data, rows=rows)
            mib, elapsed = fresh("peak")
            fresh.close()
            peaks[library].append(mib)
            taken[library].append(elapsed)
    peak, seconds = ({name: median(found) for name, found in each.items()} for each in (peaks, taken))
    emit(benchmark=NAME, rows=rows, peak_mib_above_model={name: round(value) for name, value in peak.items()})
    emit(benchmark=NAME, seconds_per_row={name: round(value / rows, 3) for name, value in seconds.items()})
    verdict(NAME, "peak above the model / PEFT's preprocess_loraga", peak["lorafa"] / peak["peft"], 0.6)
    verdict(NAME, "time / PEFT's preprocess_loraga", seconds["lorafa"] / seconds["peft"], 0.7)
    ours = Contender("lorafa", Gradients, library="lorafa", data=data, rows=rows)
    shares = ours("captured")
    emit(benchmark=NAME, check="energy of the best 8 directions", rows=rows, **shares)
    for name, target in {"one pass": 0.97, "power iteration": 0.999}.items():
        mean = min(shares[name]["left"], shares[name]["right"])
        emit(benchmark=NAME, figure=f"captured energy, {name}", value=round(mean, 5), target=target, met=mean >= target)
    accumulators, kept, dense = ours("bytes_of_statistics")
    verdict(NAME, "bytes of the accumulators / dense float32 gradients", accumulators / dense, 0.2)
    verdict(NAME, "bytes of the result / dense float32 gradients", kept / dense, 0.2)
    ours.close()


class Weights:
    """Puts adapters on fresh copies of the model."""

    def __init__(self, library: str, start: str) -> None:
        from lorafa.models.load import load_model

        self.model, _ = load_model("smollm2-135m", dtype=torch.float32)
        self.state = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.library, self.start = library, start

    def run(self) -> float:
        """Seconds get_peft_model takes."""
        import peft

        import lorafa

        module = peft if self.library == "peft" else lorafa
        settings: dict[str, Any] = {"r": WEIGHT_RANK, "lora_alpha": 32, "target_modules": "all-linear"}
        config = module.LoraConfig(**settings, task_type="CAUSAL_LM", init_lora_weights=self.start)
        start = time.perf_counter()
        adapted = module.get_peft_model(self.model, config)
        seconds = time.perf_counter() - start
        self.model = adapted.unload()
        self.model.load_state_dict(self.state)
        return seconds

    def captured(self) -> dict[str, float]:
        """What the triplets of ours hold of the exact ones' energy, mean and smallest over the layers."""
        from lorafa.numerics.linalg import leading_svd

        shares = []
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                W = module.weight.detach().float()
                best = torch.linalg.svdvals(W)[:WEIGHT_RANK].square().sum()
                found = leading_svd(W, WEIGHT_RANK, torch.Generator().manual_seed(0))
                shares.append(float(min((found.U.mT @ W).square().sum(), (W @ found.Vh.mT).square().sum()) / best))
        return {"mean": sum(shares) / len(shares), "smallest": min(shares)}


def weights(data: str, rows: int, repeats: int) -> None:
    ours = Contender("lorafa pissa", Weights, library="lorafa", start="pissa")
    shares = ours("captured")
    emit(benchmark=NAME, figure="captured energy, pissa", **shares, target=0.999, met=shares["mean"] >= 0.999)
    others = [("lorafa", "olora"), ("peft", "pissa"), ("peft", "pissa_niter_4"), ("peft", "olora")]
    contenders = [ours, *(Contender(f"{one} {start}", Weights, library=one, start=start) for one, start in others)]
    taken = {name: median(values) for name, values in interleave(contenders, "run", repeats).items()}
    emit(benchmark=NAME, seconds={name: round(value, 2) for name, value in taken.items()})
    verdict(NAME, "pissa / PEFT's exact", taken["lorafa pissa"] / taken["peft pissa"], 0.25)
    verdict(NAME, "olora / PEFT's", taken["lorafa olora"] / taken["peft olora"], 0.5)
    for each in contenders:
        each.close()


class Inputs:
    """Starts adapters from the inputs of layers, on one model that is put back every time."""

    def __init__(self, library: str, start: str, data: str, rows: int) -> None:
        from lorafa.models.load import load_model

        self.model, tokenizer = load_model("smollm2-135m", dtype=torch.float32)
        self.model.config.use_cache = False
        self.state = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.rows = rows_of(data, rows, tokenizer)
        self.library, self.start = library, start
        self.calls: list[float] = []
        self.model.register_forward_pre_hook(lambda *_: self.calls.append(time.perf_counter()))
        self.model.register_forward_hook(lambda *_: self.calls.append(time.perf_counter()))

    def _config(self, library: Any) -> Any:
        import peft.tuners.lora.config

        home = library if self.library == "lorafa" else peft.tuners.lora.config
        kind, field = {"corda": ("CordaConfig", "corda_config"), "eva": ("EvaConfig", "eva_config")}[self.start]
        settings: dict[str, Any] = {field: getattr(home, kind)(), "init_lora_weights": self.start}
        return library.LoraConfig(
            r=WEIGHT_RANK, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM", **settings
        )

    def _adapted(self) -> Any:
        import peft

        import lorafa

        module = peft if self.library == "peft" else lorafa
        config = self._config(module)
        if self.start == "eva":
            adapted = module.get_peft_model(self.model, config)
            module.initialize_lora_eva_weights(adapted, self.rows, show_progress_bar=False)
            return adapted
        if self.library == "lorafa":
            return lorafa.initialize(self.model, config, self.rows)
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(self.model, config, run_model=self._forward)
        return peft.get_peft_model(self.model, config)

    @torch.no_grad()
    def _forward(self) -> None:
        for row in self.rows:
            self.model(**row)

    def run(self) -> float:
        """Seconds from the plain model to the started adapter."""
        start = time.perf_counter()
        self.calls.clear()
        adapted = self._adapted()
        seconds = time.perf_counter() - start
        self.model = adapted.unload()
        self.model.load_state_dict(self.state)
        return seconds

    def run_alone(self) -> float:
        """The same without those from the first to the last call of the model."""
        return self.run() - (self.calls[-1] - self.calls[0])

    def captured(self) -> dict[str, float]:
        """What B's columns hold of the energy of the best directions of W C, mean and smallest over the layers."""
        import lorafa
        from lorafa.initializers.corda import DAMPING, ERROR
        from lorafa.numerics.linalg import damped_until_invertible

        stats = lorafa.collect_statistics(self.model, self._config(lorafa), self.rows)
        weights = {name: module.weight.detach().clone() for name, module in self.model.named_modules() if name in stats}
        adapted, shares = lorafa.start_from(self.model, self._config(lorafa), stats), []
        for name, layer in adapted.base_model.lora_layers():
            C, _ = damped_until_invertible(stats[name]["corda_moment.C"], DAMPING, ERROR)
            T = weights[name] @ C
            Q = torch.linalg.qr(layer.factor_B("default").detach()).Q
            assert not layer.fallbacks, f"{name}: {layer.fallbacks}"
            shares.append(float((Q.mT @ T).square().sum() / torch.linalg.svdvals(T)[:WEIGHT_RANK].square().sum()))
        self.model = adapted.unload()
        return {"mean": sum(shares) / len(shares), "smallest": min(shares)}


def inputs(data: str, rows: int, repeats: int) -> None:
    for start, target in {"corda": 0.25, "eva": 0.5}.items():
        ours, theirs = (Contender(n, Inputs, library=n, start=start, data=data, rows=rows) for n in ("lorafa", "peft"))
        if start == "corda":
            shares = ours("captured")
            emit(benchmark=NAME, figure="captured energy, corda", **shares, target=0.999, met=shares["mean"] >= 0.999)
        taken = {name: median(values) for name, values in interleave([ours, theirs], "run", repeats).items()}
        emit(benchmark=NAME, start=start, seconds={name: round(value, 2) for name, value in taken.items()})
        verdict(NAME, f"{start} / PEFT's", taken["lorafa"] / taken["peft"], target)
        if start == "corda":
            alone = {n: median(v) for n, v in interleave([ours, theirs], "run_alone", repeats, warmups=0).items()}
            emit(benchmark=NAME, start=start, seconds_without_passes={n: round(v, 2) for n, v in alone.items()})
            verdict(NAME, "corda without the passes / PEFT's", alone["lorafa"] / alone["peft"], target)
        ours.close()
        theirs.close()


LLAMA_7B = ("Llama-2-7B", 32, [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)])
LLAMA_70B = (
    "Llama-2-70B",
    80,
    [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)],
)


def paper(data: str, rows: int, repeats: int) -> None:
    from lorafa.calibration.base import Measured
    from lorafa.calibration.gradient import GradientSketch

    for name, blocks, shapes in (LLAMA_7B, LLAMA_70B):
        sketches = [GradientSketch(Measured(name, out, in_, RANK)) for out, in_ in shapes]
        ours = blocks * sum(sketch_bytes(sketch) for sketch in sketches)
        dense = blocks * sum(4 * out * in_ for out, in_ in shapes)
        emit(benchmark=NAME, model=name, sketches_gb=round(ours / 1e9, 3), dense_gb=round(dense / 1e9, 2))
        verdict(NAME, f"bytes of the sketches / dense float32 gradients, {name}", ours / dense, 0.02)


PARTS: dict[str, Callable[[str, int, int], None]] = {
    "gradient": gradient,
    "weights": weights,
    "inputs": inputs,
    "paper": paper,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="gsm8k_train.jsonl")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    for part in arguments.only:
        PARTS[part](arguments.data, arguments.rows, arguments.repeats)


if __name__ == "__main__":
    main()
