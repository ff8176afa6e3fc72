"""What do many records cost before the first step: seconds and memory, with their tokens in the cache and without?

    python benchmarks/bench_records.py            # 10k, 100k and 1M plain texts, 10k and 100k conversations
    python benchmarks/bench_records.py 10000      # of this many alone

Each start is a process of its own. A first start reads and tokenizes and fills the cache; a second one checks the
cached file and takes the tokens from there. Memory is what the process takes beyond what it had before it saw the
records.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import warnings
from pathlib import Path

from harness import Contender, emit, timed, verdict

NAME = "records"
ROWS = {"text": (10_000, 100_000, 1_000_000), "pairs": (10_000, 100_000)}
BYTES = 44.0
"""Bytes of memory a row may take, of all that grow with the rows."""


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Start:
    """A tokenizer is there, the records are not."""

    def __init__(self, file: str, cache: str) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        from lorafa.data.prepared import prepare_samples
        from lorafa.data.selection import Division
        from lorafa.data.sources import Choice, open_data

        warnings.simplefilter("ignore")
        os.environ["LORAFA_CACHE"] = cache
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
        from lorafa.data.templates import CHATML

        self.tokenizer.chat_template = CHATML.text
        self.choice = Choice(names=(file,), division=Division(None, None, 0))
        self.prepare, self.open = prepare_samples, open_data
        self.tokenizer("a")

    def start(self) -> tuple[float, float, int, int]:
        """(seconds to the samples, MiB they took, samples, tokens)."""
        before = peak_mib()
        found = []
        seconds = timed(lambda: found.append(self.prepare(self.open(self.choice), self.tokenizer, 512, cache=True)))
        used = peak_mib() - before
        return seconds, used, len(found[0].train.samples), found[0].tokens

    def epoch(self) -> tuple[float, float]:
        """(seconds to read each sample once, MiB it took)."""
        before = peak_mib()
        samples = self.prepare(self.open(self.choice), self.tokenizer, 512, cache=True).train.samples
        return timed(lambda: [None for _ in samples]), peak_mib() - before


def write(file: Path, form: str, rows: int) -> None:
    with file.open("w", encoding="utf-8") as out:
        for row in range(rows):
            asked, answer = f"What is {row} and {row % 97}?", f"It is {row + row % 97}."
            value = {"text": f"{asked} {answer}"} if form == "text" else {"prompt": asked, "completion": answer}
            out.write(json.dumps(value) + "\n")


def measured(folder: Path, form: str, rows: int) -> float:
    """MiB that a first start takes."""
    file = folder / f"{form}{rows}.jsonl"
    write(file, form, rows)
    taken = []
    for start in ("first", "second"):
        contender = Contender(start, Start, threads=1, file=str(file), cache=str(folder / "cache"))
        seconds, mib, samples, tokens = contender("start")
        passed, more = contender("epoch")
        contender.close()
        emit(
            benchmark=NAME, form=form, rows=rows, start=start, samples=samples, tokens=tokens,
            seconds=round(seconds, 2), rows_a_second=round(rows / seconds), mib=round(mib, 1),
            epoch_seconds=round(passed, 2), epoch_mib=round(more, 1),
        )  # fmt: skip
        taken.append(mib)
    return taken[0]


def main() -> None:
    given = [int(rows) for rows in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        for form, usual in ROWS.items():
            mib = {rows: measured(Path(folder), form, rows) for rows in given or usual}
            if 1_000_000 in mib and 100_000 in mib:
                grown = (mib[1_000_000] - mib[100_000]) * 2**20 / 900_000
                verdict(NAME, f"{form}: bytes of memory a row, from 100k to 1M rows", grown, BYTES)


if __name__ == "__main__":
    main()
