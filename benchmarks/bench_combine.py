"""How long does one adapter made of eight take?  add_weighted_adapter with "svd" in lorafa and in PEFT.

    python benchmarks/bench_combine.py [--adapters 8] [--rank 16] [--layers 30] [--targets all-linear] [--repeats 3]

The shape of SmolLM2-135M with random weights in float32, adapters of random factors on all linear layers, or on the
targets named, of one rank. Both libraries get the same numbers. The combinations are compared first, layer by layer, as
matrices: PEFT decomposes the dense sum of the updates, lorafa the stacked factors. Then each combines and deletes the
result again, in turns; only combining is timed. A target of 0.1 stands in the last row.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from harness import THREADS, Contender, emit, interleave, median, positive, timed, verdict

from lorafa.models import MODELS

NAME = "combine"
MODEL = "smollm2-135m"
OURS, THEIRS = "lorafa", "PEFT"
WANTED = 0.1
CLOSE = 1e-4
"""How far apart the combinations may be, of the norm of one: both are computed in float32."""


class Adapters:
    """A model with trained adapters "0", "1" ... in one of the libraries."""

    def __init__(self, library: str, count: int, rank: int, layers: int, targets: list[str]) -> None:
        import transformers

        warnings.simplefilter("ignore")  # PEFT's words on the names of adapters
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(**MODELS.get(MODEL).shape | {"num_hidden_layers": layers})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if library == OURS:
            import lorafa as chosen
        else:
            import peft as chosen
        where: Any = targets[0] if targets == ["all-linear"] else targets
        settings = chosen.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=where)
        self.model: Any = chosen.get_peft_model(model, settings, "0")
        self.names = [str(number) for number in range(count)]
        for name in self.names[1:]:
            self.model.add_adapter(name, settings)
        self.weights = [1.0 / (number + 1) for number in range(count)]
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        """Random factors, the same in both libraries, with spectra that fall, as trained ones do."""
        for index, (_, layer) in enumerate(self._layers()):
            for number, name in enumerate(self.names):
                generator = torch.Generator().manual_seed(1000 * index + number)
                A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
                falling = torch.arange(1, A.shape[0] + 1) ** -0.5
                A.copy_(torch.randn(A.shape, generator=generator) / A.shape[1] ** 0.5)
                B.copy_(torch.randn(B.shape, generator=generator) * falling)

    def _layers(self) -> list[tuple[str, Any]]:
        return [(name, m) for name, m in self.model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")]

    def _combine(self) -> None:
        self.model.add_weighted_adapter(self.names, self.weights, "sum", "svd")

    def combine(self) -> float:
        """Seconds that one combination takes."""
        seconds = timed(self._combine)
        self.model.delete_adapter("sum")
        return seconds

    @torch.no_grad()
    def updates(self) -> list[torch.Tensor]:
        """The update of the combination on every layer, (out, in)."""
        self._combine()
        found = [
            layer.lora_B["sum"].weight @ layer.lora_A["sum"].weight * float(layer.scaling["sum"])
            for _, layer in self._layers()
        ]
        self.model.delete_adapter("sum")
        return found


def agree(**made: Any) -> float:
    """The largest difference of the two libraries' combinations, of the norm of one; one model at a time.

    Raises:
        SystemExit: it is too large for rounding.
    """
    ours, theirs = (Adapters(library, **made).updates() for library in (OURS, THEIRS))
    assert len(ours) == len(theirs)
    apart = max(float((one - other).norm() / other.norm()) for one, other in zip(ours, theirs, strict=True))
    emit(benchmark=NAME, figure="difference of the combinations", value=apart, layers=len(ours))
    if apart > CLOSE:
        raise SystemExit(f"the combinations differ by {apart:.2e}, more than {CLOSE:g}: nothing is timed")
    return apart


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=positive, default=8)
    parser.add_argument("--rank", type=positive, default=16)
    parser.add_argument(
        "--layers", type=positive, default=30, help="of the model, which has seven linear layers in each"
    )
    parser.add_argument("--targets", nargs="+", default=["all-linear"])
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=THREADS)
    return parser.parse_args(words)


def main() -> None:
    arguments = read_arguments()
    made = {
        "count": arguments.adapters, "rank": arguments.rank, "layers": arguments.layers, "targets": arguments.targets
    }  # fmt: skip
    torch.set_num_threads(arguments.threads)
    agree(**made)
    contenders = [Contender(n, Adapters, threads=arguments.threads, library=n, **made) for n in (OURS, THEIRS)]
    seconds = interleave(contenders, "combine", arguments.repeats)
    for contender in contenders:
        values = seconds[contender.name]
        emit(benchmark=NAME, case=contender.name, seconds=round(median(values), 4),
             all_seconds=[round(value, 4) for value in values], peak_mib=round(contender.peak_mib()),
             model=MODEL, threads=arguments.threads, **made)  # fmt: skip
        contender.close()
    verdict(NAME, f"{OURS} / {THEIRS}", median(seconds[OURS]) / median(seconds[THEIRS]), WANTED)


if __name__ == "__main__":
    main()
