"""How long does it take to find and repair the intruder dimensions of a layer, beside PEFT?

    python benchmarks/bench_intruders.py [--sizes 576x576 2048x2048 4096x4096] [--repeats 3]

One layer of each size (outputs x inputs) in float32, r = 16. Its weight has the spectrum of a language model's, a few
large singular values and a slow fall (sigma_i = i^-0.5), and its update one direction that is an intruder. lorafa and
PEFT take turns, each in a process of its own; the updates they make are compared before the times are.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import peft
import torch
from harness import Contender, emit, interleave, median, timed
from torch import Tensor, nn

import lorafa

NAME, RANK = "intruders", 16


def weight(out: int, in_: int) -> Tensor:
    """A random matrix with singular values i^-0.5, made without decomposing one of its size."""
    generator = torch.Generator().manual_seed(0)
    k = min(out, in_)
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=generator)).Q for size in (out, in_))
    return U * torch.arange(1, k + 1).pow(-0.5) @ V.T


class Repair:
    """One library with an adapter on a model of one layer."""

    def __init__(self, library: str, out: int, in_: int) -> None:
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        layer = nn.Linear(in_, out, bias=False)
        layer.weight.data.copy_(weight(out, in_))
        self.library = {"lorafa": lorafa, "peft": peft}[library]
        config = self.library.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"])
        self.model: Any = self.library.get_peft_model(nn.ModuleDict({"layer": layer}), config)
        generator = torch.Generator().manual_seed(1)
        adapted = self.model.base_model.model["layer"]
        with torch.no_grad():
            A, B = (torch.randn(shape, generator=generator) for shape in ((RANK, in_), (out, RANK)))
            adapted.lora_A["default"].weight.copy_(A / in_**0.5)
            adapted.lora_B["default"].weight.copy_(B / out**0.5 * torch.tensor([2.0] + [0.05] * (RANK - 1)))

    def run(self) -> float:
        """Seconds of one reduction, whose adapter stays."""
        if "intruder_reduced" in self.model.peft_config:
            self.model.delete_adapter("intruder_reduced")
            self.model.set_adapter("default")
        return timed(self._reduce)

    def _reduce(self) -> None:
        if self.library is lorafa:
            lorafa.reduce_intruder_dimension(self.model, logging_sink=None)
        else:
            from peft.tuners.lora.intruders import reduce_intruder_dimension

            reduce_intruder_dimension(self.model, logging_sink=None)

    def update(self) -> Tensor:
        delta: Tensor = self.model.base_model.model["layer"].get_delta_weight("intruder_reduced").detach()
        return delta


def compare(out: int, in_: int, repeats: int) -> None:
    contenders = [Contender(name, Repair, library=name, out=out, in_=in_) for name in ("lorafa", "peft")]
    seconds = interleave(contenders, "run", repeats)
    ours, theirs = (contender("update") for contender in contenders)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    times = {name: median(taken) for name, taken in seconds.items()}
    peaks = {contender.name: contender.peak_mib() for contender in contenders}
    emit(
        benchmark=NAME, shape=f"{out}x{in_}", rank=RANK, dtype="float32",
        **{f"{name}_seconds": round(taken, 3) for name, taken in times.items()},
        **{f"{name}_peak_mib": round(peak) for name, peak in peaks.items()},
        ratio=round(times["lorafa"] / times["peft"], 3),
    )  # fmt: skip
    for contender in contenders:
        contender.close()


def size(text: str) -> tuple[int, int]:
    out, _, in_ = text.partition("x")
    return int(out), int(in_)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=size, nargs="+", default=[(576, 576), (2048, 2048), (4096, 4096)])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for out, in_ in arguments.sizes:
        compare(out, in_, arguments.repeats)


if __name__ == "__main__":
    main()
