"""Train an encoder to rescore n-best lists: LoRA and a linear head, fewest expected word errors (arXiv:2309.15223).

python recipes/rescoring.py train.jsonl heldout.jsonl --out runs/rescorer [--model minilm-l6]

A row of both files is {"hypotheses": [{"text": ..., "score": ..., "errors": ...}, ...], "reference": ...}. The score is
the first-pass cost, lower is better (--higher-is-better: a log-probability). Without "errors" they are counted against
the reference. What is printed is one JSON object a line; "wer" has the word error rates of the held-out lists by the
first pass alone, rescored, and where the best of each list is chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafa.data.nbest import NBest, read_nbest, word_error_rate
from lorafa.errors import ConfigError, DataError, DivergedError, LoraError

if TYPE_CHECKING:
    from torch import Tensor


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="n-best lists to train on")
    parser.add_argument("heldout", type=Path, help="n-best lists that are measured before and after")
    parser.add_argument("--out", type=Path, required=True, help="folder to create: the adapter with its head")
    parser.add_argument("--model", default="minilm-l6", help="encoder: a name, a folder or a Hub id (%(default)s)")
    parser.add_argument("--higher-is-better", action="store_true", help="scores are log-probabilities, not costs")
    parser.add_argument("--beta", type=float, default=1.0, help="what the new score counts (%(default)s)")
    parser.add_argument("--correlation", type=float, default=0.001, help="weight of ||R - I||_F^2 (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA (%(default)s)")
    parser.add_argument("--alpha", type=int, default=None, help="of LoRA (twice the rank)")
    parser.add_argument("--targets", nargs="+", default=["query", "value"], help="layers with LoRA (query value)")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate, falls to 0 (%(default)s)")
    parser.add_argument("--epochs", type=_count, default=3, help="passes over the lists (%(default)s)")
    parser.add_argument("--batch-size", type=_count, default=8, help="lists a step (%(default)s)")
    parser.add_argument("--max-length", type=_count, default=128, help="tokens of a hypothesis (%(default)s)")
    parser.add_argument("--log-every", type=_count, default=10, help="steps between printed losses (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the head, LoRA, dropout and the order (%(default)s)")
    return parser.parse_args(words)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 on is needed, found {text!r}")
    return int(text)


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    try:
        run(arguments)
    except LoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Read, measure, train, measure, save.

    Raises:
        LoraError: something given cannot be used; nothing was written.
    """
    train, heldout = _lists(arguments)
    import torch  # only now: help and broken files are answered at once

    from lorafa.models.rescoring import RescoringLoss

    objective = RescoringLoss(arguments.beta, arguments.correlation)
    torch.manual_seed(arguments.seed)
    scorer = Scorer(arguments)
    report = {"event": "data", "train": len(train), "heldout": len(heldout), "max_length": scorer.max_length}
    _say(**report, cut=scorer.cut(train + heldout))
    parameters = [p for p in scorer.model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in scorer.model.parameters())
    _say(event="model", model=arguments.model, trained=sum(p.numel() for p in parameters), parameters=total)
    _say(event="wer", step=0, **scorer.rates(heldout, arguments))

    per_epoch = math.ceil(len(train) / arguments.batch_size)
    steps = per_epoch * arguments.epochs
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    scorer.model.train()
    for step, batch in enumerate(_batches(train, arguments), 1):
        scores, vectors = scorer(batch)
        first_pass, errors, mask = _tensors(batch, scores)
        expected, penalty = objective.terms(scores, first_pass, errors, mask, vectors)
        loss = expected + objective.weight * penalty
        if not math.isfinite(loss.item()):
            raise DivergedError(f"The loss of step {step} is {loss.item()}. Lower --lr; nothing was written.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % arguments.log_every == 0 or step == steps:
            _say(event="step", step=step, loss=loss.item(), expected=expected.item(), correlation=penalty.item())
    _say(event="wer", step=steps, **scorer.rates(heldout, arguments))
    scorer.save(arguments)
    _say(event="saved", adapter=str(arguments.out))


class Scorer:
    """An encoder with LoRA and a head of one output, which gives each hypothesis a cost."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from lorafa import LoraConfig, get_peft_model
        from lorafa.models.load import load, on_accelerator

        config = LoraConfig(
            task_type="SEQ_CLS",
            r=arguments.rank,
            lora_alpha=2 * arguments.rank if arguments.alpha is None else arguments.alpha,
            target_modules=arguments.targets,
        )
        _check_encoder(arguments.model)
        loaded = load(arguments.model, "float32", kind="classification", seed=arguments.seed, classes=("cost",))
        if loaded.new:  # an encoder's pooler may be, beside the head
            config.modules_to_save = list(loaded.new)
        self.tokenizer = loaded.tokenizer
        context = getattr(loaded.model.config, "max_position_embeddings", None) or arguments.max_length
        self.max_length = min(arguments.max_length, context, self.tokenizer.model_max_length)
        self.model: Any = on_accelerator(get_peft_model(loaded.model, config))

    def __call__(self, batch: Sequence[NBest]) -> tuple[Tensor, Tensor]:
        """Costs (lists, hypotheses), 0 on padding, and the first token's last states (all hypotheses, width)."""
        import torch

        texts = [one.text for single in batch for one in single.hypotheses]
        tokens = self.tokenizer(
            texts, truncation=True, max_length=self.max_length, padding=True, return_tensors="pt"
        ).to(self.model.device)
        output = self.model(**tokens, output_hidden_states=True)
        by_list = output.logits[:, 0].split([len(single.hypotheses) for single in batch])
        return torch.nn.utils.rnn.pad_sequence(by_list, batch_first=True), output.hidden_states[-1][:, 0]

    def cut(self, lists: Sequence[NBest]) -> int:
        """How many hypotheses are longer than what is read of them."""
        texts = [one.text for single in lists for one in single.hypotheses]
        return sum(len(ids) > self.max_length for ids in self.tokenizer(texts, verbose=False)["input_ids"])

    def rates(self, lists: Sequence[NBest], arguments: argparse.Namespace) -> dict[str, float]:
        """Word error rates by the first pass alone, rescored, and by an oracle."""
        from lorafa.models.modes import evaluating
        from lorafa.models.rescoring import total_costs

        chosen: list[int] = []
        with evaluating(self.model):
            for start in range(0, len(lists), arguments.batch_size):
                batch = lists[start : start + arguments.batch_size]
                scores, _ = self(batch)
                first_pass, _, mask = _tensors(batch, scores)
                if not scores.isfinite().all():
                    raise DivergedError("The model's scores are not finite. Lower --lr; nothing was written.")
                chosen += total_costs(scores, first_pass, mask, arguments.beta).argmin(1).tolist()
        return {
            "first_pass": word_error_rate(lists, [one.first_pass() for one in lists]),
            "rescored": word_error_rate(lists, chosen),
            "oracle": word_error_rate(lists, [one.oracle() for one in lists]),
        }

    def save(self, arguments: argparse.Namespace) -> None:
        """The adapter with its head, the tokenizer, and how the two scores are added."""
        self.model.save_pretrained(arguments.out)
        self.tokenizer.save_pretrained(arguments.out)
        said = {"beta": arguments.beta, "higher_is_better": arguments.higher_is_better, "max_length": self.max_length}
        (arguments.out / "rescoring.json").write_text(json.dumps(said) + "\n", encoding="utf-8")


def _lists(arguments: argparse.Namespace) -> tuple[list[NBest], list[NBest]]:
    """Both files, after all that can be checked before a model is loaded."""
    out = arguments.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already. Give --out a folder that is not, or is empty.")
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"{out} cannot be made: {above} is no folder that can be written to. Give another --out.")
    if not 0 < arguments.lr < math.inf:
        raise ConfigError(f"--lr is a number above 0, found {arguments.lr}.")
    train, heldout = (
        read_nbest(path, higher_is_better=arguments.higher_is_better) for path in (arguments.train, arguments.heldout)
    )
    if arguments.train.samefile(arguments.heldout):
        raise ConfigError(f"{arguments.heldout} is what is trained on, too. Give lists that are held out.")
    word_error_rate(heldout, [one.first_pass() for one in heldout])  # or says what a row lacks
    if all(len({each.errors for each in one.hypotheses}) == 1 for one in train):
        raise DataError(
            f"{arguments.train}: in each of its {len(train)} lists all hypotheses have equally many errors, so there "
            "is nothing to learn. Give lists of which some hypotheses are better."
        )
    lowest = sum(one.hypotheses[one.first_pass()].errors for one in train)
    highest = sum(max(one.hypotheses, key=lambda each: each.score).errors for one in train)
    if highest < lowest:
        other = "without" if arguments.higher_is_better else "with"
        print(
            f"warning: the first pass's choice has {lowest} errors, and its last one {highest}. Are the scores of the "
            f"other sign? Then run {other} --higher-is-better.",
            file=sys.stderr,
        )
    return train, heldout


def _check_encoder(name: str) -> None:
    """Raises ConfigError for a model whose first token does not see the others."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    from lorafa.models.load import resolve_model
    from lorafa.models.sourced import as_source_error, model_step

    place = resolve_model(name)
    with as_source_error(f"Could not load an encoder from {name!r}", model_step()):
        config = AutoConfig.from_pretrained(place)
    turned = getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False)
    if config.model_type not in ENCODERS or turned:
        raise ConfigError(
            f"--model {name} is of the type {config.model_type!r} and no encoder: its first token does not read the "
            "whole hypothesis. Give an encoder such as BERT."
        )


def _tensors(batch: Sequence[NBest], scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First-pass costs in float64, errors, and True where there is a hypothesis, each of the shape of the scores."""
    import torch

    first_pass = torch.zeros(scores.shape, dtype=torch.float64)
    errors, mask = torch.zeros(scores.shape, dtype=torch.long), torch.zeros(scores.shape, dtype=torch.bool)
    for row, one in enumerate(batch):
        size = len(one.hypotheses)
        first_pass[row, :size] = torch.tensor([each.score for each in one.hypotheses], dtype=torch.float64)
        errors[row, :size] = torch.tensor([each.errors for each in one.hypotheses])
        mask[row, :size] = True
    # Only differences within a list count; long utterances have costs of which float32 would keep few digits.
    first_pass -= first_pass[:, :1].clone()
    return first_pass.float().to(scores.device), errors.to(scores.device), mask.to(scores.device)


def _batches(lists: Sequence[NBest], arguments: argparse.Namespace) -> Iterator[list[NBest]]:
    """All lists in an order of the seed, once an epoch."""
    import torch

    generator = torch.Generator().manual_seed(arguments.seed)
    for _ in range(arguments.epochs):
        order = torch.randperm(len(lists), generator=generator).tolist()
        for start in range(0, len(order), arguments.batch_size):
            yield [lists[number] for number in order[start : start + arguments.batch_size]]


def _say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    sys.exit(main())
