"""A whole training of SmolLM2-135M on GSM8K problems: lorafa's runner against PEFT with transformers' Trainer.

    python benchmarks/bench_end_to_end.py --data gsm8k_train.jsonl [--steps 24] [--repeats 3]

bfloat16, r = 16 on all linear layers, dropout 0.05, batches of 8, AdamW at 1e-3 with a linear schedule, the same rows
in the same tokens with the answers supervised, the same seed. PEFT is used as its quick tour does: `Trainer` with its
own defaults and a collator that pads to the longest of a batch. lorafa is what `lorafa train` runs with its defaults.
Each training is one turn, with a seed of its own; both take turns. Losses are compared on held-out rows after the
training, seed by seed.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import THREADS, Contender, emit, interleave, median, timed, verdict

from lorafa.runs.comparison import interval

NAME = "end_to_end"
BATCH, RATE, HELD_OUT = 8, 1e-3, 64


class Training:
    """One library, its model and its rows; a call of ``train`` begins with a new adapter."""

    def __init__(self, library: str, data: str, steps: int, more: list[str]) -> None:
        from lorafa.conf.compose import compose
        from lorafa.data.chat import encode_all
        from lorafa.data.collate import Collator
        from lorafa.data.sources import load_records
        from lorafa.models.load import load_model

        self.library, self.steps = library, steps
        self.config = compose(
            [
                f"optim.lr={RATE}", f"train.steps={steps}", f"train.batch_size={BATCH}", "train.checkpoint_every=0",
                "peft.lora_dropout=0.05", "peft.target_modules=all-linear", "peft.r=16", "peft.lora_alpha=32", *more,
            ]
        )  # fmt: skip
        records = load_records(data, train_size=steps * BATCH, eval_size=HELD_OUT, seed=0)
        attention = self.config.model.attention
        if library == "peft" and attention == "auto":
            attention = "sdpa"  # as transformers chooses; lorafa's runner computes it in blocks
        self.base, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16, attention=attention)
        self.rows = encode_all(records.train, tokenizer, 1024).samples
        self.heldout = encode_all(records.heldout, tokenizer, 1024).samples
        self.collator = Collator(tokenizer.pad_token_id or 0)
        self.model: Any = None
        self.losses: list[float] = []
        """On the held-out rows, after each training."""

    def train(self) -> float:
        if self.model is not None:
            self.base = self.model.unload()
        self.seed = len(self.losses)
        torch.manual_seed(self.seed)
        with tempfile.TemporaryDirectory() as folder:
            seconds = (self._lorafa if self.library == "lorafa" else self._peft)(Path(folder))
        self.losses.append(self.heldout_loss())
        return seconds

    def _lorafa(self, folder: Path) -> float:
        from lorafa.data.packing import PackCollator
        from lorafa.models.head_loss import Trial
        from lorafa.peft_model import get_peft_model
        from lorafa.train.adapter_config import lora_config
        from lorafa.train.fit import Material, fit
        from lorafa.train.recipe import batch_rows

        config = replace(self.config, train=replace(self.config.train, seed=self.seed))
        self.model = get_peft_model(self.base, lora_config(config, self.base))
        rows = batch_rows(self.rows, config)
        material = Material(self.model, rows, [], PackCollator(self.collator), lambda ids: str(ids), Trial(None))
        return timed(lambda: fit(material, config, folder, [], None))

    def _peft(self, folder: Path) -> float:
        import peft
        from transformers import Trainer, TrainingArguments

        settings: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
        self.model = peft.get_peft_model(self.base, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=BATCH, learning_rate=RATE, max_steps=self.steps, warmup_steps=0.05,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False, seed=self.seed,
        )  # fmt: skip
        trainer = Trainer(self.model, arguments, train_dataset=self.rows, data_collator=self.collator)
        return timed(trainer.train)

    def heldout_loss(self) -> float:
        from lorafa.evals.loss import answer_loss
        from lorafa.models.head_loss import supervised_nll

        return answer_loss(self.model, self.heldout, self.collator, BATCH, supervised_nll)

    def heldout_losses(self) -> list[float]:
        return self.losses

    def tokens(self) -> int:
        """Supervised tokens of a training: each row is seen once."""
        return sum(sample.trained for sample in self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="word_problems", help="a jsonl of question/answer rows")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--warmups", type=int, default=0, help="turns that are not counted")
    parser.add_argument("overrides", nargs="*", help="settings of lorafa's run")
    arguments = parser.parse_intermixed_args()
    data = str(Path(arguments.data).resolve()) if Path(arguments.data).exists() else arguments.data
    both = [
        Contender(name, Training, threads=arguments.threads, library=name, data=data, steps=arguments.steps,
                  more=arguments.overrides)
        for name in ("lorafa", "peft")
    ]  # fmt: skip
    taken = interleave(both, "train", arguments.repeats, arguments.warmups)
    figures, losses = {}, {}
    for contender in both:
        seconds, tokens, peak = median(taken[contender.name]), contender("tokens"), contender.peak_mib()
        losses[contender.name] = contender("heldout_losses")[arguments.warmups :]
        figures[contender.name] = (tokens / seconds, peak)
        emit(benchmark=NAME, case=contender.name, trained_tokens=tokens, tokens_a_second=round(tokens / seconds, 1),
             peak_mib=round(peak), heldout_losses=[round(loss, 4) for loss in losses[contender.name]],
             all_seconds=[round(value, 1) for value in taken[contender.name]])  # fmt: skip
        contender.close()
    ours, peft = figures["lorafa"], figures["peft"]
    emit(benchmark=NAME, figure="trained tokens a second / PEFT", value=round(ours[0] / peft[0], 3), target=2.5,
         met=ours[0] >= 2.5 * peft[0])  # fmt: skip
    verdict(NAME, "peak memory / PEFT", ours[1] / peft[1], 0.30)
    found = interval([one - other for one, other in zip(losses["lorafa"], losses["peft"], strict=True)])
    emit(benchmark=NAME, figure="held-out loss minus PEFT's, by seed", **found)


if __name__ == "__main__":
    main()
