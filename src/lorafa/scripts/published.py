"""The keys of the published `run_exp.py`, and what each of them is here: the one table of them.

The scripts are those of LoRA-GA (arXiv:2407.05000) and LoRA-One (arXiv:2502.01235), whose commands other documents
repeat. Their groups with their own defaults are the yaml files in ``conf`` beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "conf"
GROUPS = ("model", "init", "peft")
DEFAULT_CHOICES: Mapping[str, str] = {"model": "llama", "init": "default"}
"""Options that need not be named; one of ``peft`` has to be."""
OURS = ("data", "optim", "train", "eval", "run_dir", "if_exists", "threads", "report_to")
"""Groups and settings of `lorafa train` that may be given beside the keys, where they have none of that name."""


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a published key is here: a line of ``PUBLISHED_KEYS``."""

    ours: str = ""
    """What says the same in `lorafa train`."""
    means: str = ""
    """What is to be known beyond that."""
    dead: bool = False
    """Whether it is taken and changes nothing; ``means`` is then the reason, which a command that has it is told."""

    @property
    def passed(self) -> str | None:
        """Our setting that takes the value as it stands; None where more is to be done."""
        return self.ours if self.ours and not set(self.ours) & set(" =-") else None


PUBLISHED_KEYS: Mapping[str, Meaning] = {
    "dataset_name": Meaning(
        ours="data=, data.template=spaced",
        means='a data set known by name, a file or a Hub id; meta_math where none is named. Text is x + " " + y + end',
    ),
    "seed": Meaning(ours="train.seed", means="42 where none is named"),
    "dry_run": Meaning(ours="--dry-run", means="show what would be done"),
    "gradient_checkpointing": Meaning(ours="train.gradient_checkpointing"),
    "wandb.name": Meaning(
        ours="run_dir=runs/<name>",
        means="a run of this name with the same settings is continued, one with others gets <name>-2",
    ),
    "wandb.project": Meaning(
        ours="report_project", means="where report_to=wandb is given too; else a run is its directory"
    ),
    "wandb.entity": Meaning(
        dead=True, means="W&B is told by its variable WANDB_ENTITY, where report_to=wandb is given"
    ),
    "model.name": Meaning(ours="model.name"),
    "model.type": Meaning(
        ours="model.kind=",
        means="CausalLM; or ConditionalGeneration, T5 and its like: x is read, y and end are written",
    ),
    "model.bf16": Meaning(ours="model.dtype=bfloat16", means="false: float32"),
    "model.epochs": Meaning(ours="train.epochs"),
    "model.eval_epochs": Meaning(
        ours="train.eval_epochs=, train.keep_checkpoints=",
        means="there is a checkpoint after each epoch, and that many (at least one) are kept",
    ),
    "model.max_length": Meaning(ours="data.max_length"),
    "model.real_batch_size": Meaning(
        ours="train.accumulation=", means="real_batch_size / (per_device_batch_size x processes), which must be whole"
    ),
    "model.per_device_batch_size": Meaning(ours="train.batch_size=, eval.batch_size="),
    "model.learning_rate": Meaning(ours="optim.lr"),
    "model.weight_decay": Meaning(ours="optim.weight_decay"),
    "model.logging_steps": Meaning(ours="train.log_every"),
    "model.saving": Meaning(ours="train.save_merged", means="after training the merged model is saved too, in merged/"),
    "model.early_stopping_patience": Meaning(
        dead=True, means="the published training never acts on it; train.patience does"
    ),
    "model.prec_reg": Meaning(
        dead=True,
        means="it belongs to the preconditioned optimizer, which is optim=preconditioned optim.prec_reg=... here",
    ),
    "init.mode": Meaning(ours="init.mode=", means="simple, svd or gradient, as the options of init say"),
    "init.lora_A": Meaning(ours="init=both_random init.lora_A=", means="simple: sampler of A"),
    "init.lora_B": Meaning(
        ours="init=both_random init.lora_B=", means="simple: sampler of B; zeros: nothing is taken out"
    ),
    "init.lora_A_std": Meaning(ours="init=both_random init.lora_A_std=", means="standard deviation of a gaussian A"),
    "init.lora_B_std": Meaning(ours="init=both_random init.lora_B_std=", means="standard deviation of a gaussian B"),
    "init.direction": Meaning(
        ours="init.direction=",
        means="LoRA-One, of which LoRA-FA is another name; LoRA-GA is ArB2r; ArBr, A2rBr, random",
    ),
    "init.scale": Meaning(
        ours="init.scale=",
        means="simple: default, stable; svd: default, stable, unit, normalized; gradient: stable, gd, unit, weightS",
    ),
    "init.stable_gamma": Meaning(ours="init.stable_gamma=", means="of scale stable"),
    "init.norm_clip": Meaning(
        ours="init.norm_clip=", means="where the start is taken out of the base, it is made no larger than the base"
    ),
    "init.bsz": Meaning(ours="init.bsz=", means="gradient: rows in a batch"),
    "init.iters": Meaning(ours="init.iters=", means="gradient: batches of the first rows"),
    "init.max_length": Meaning(ours="init.max_length=", means="gradient: longest of these rows in tokens"),
    "init.dtype": Meaning(means="fp32, which adapters have; bf16 is refused"),
    "init.weight": Meaning(dead=True, means="the published code reads init.scale, of which stable is the default"),
    "peft.use_peft": Meaning(ours="peft.full=true", means="false: no adapter, all weights are trained"),
    "peft.lora_r": Meaning(ours="peft.r=", means="this or lora_relative_r"),
    "peft.lora_relative_r": Meaning(
        ours="peft.r=", means="the rank as a share of the smaller side of the model's first linear layer, rounded down"
    ),
    "peft.lora_target_modules": Meaning(ours="peft.target_modules=", means="all: all-linear"),
    "peft.lora_alpha": Meaning(ours="peft.lora_alpha="),
    "peft.lora_dropout": Meaning(ours="peft.lora_dropout="),
    "peft.use_rslora": Meaning(ours="peft.use_rslora="),
    "peft.dora": Meaning(ours="peft.use_dora=", means="the start asked for is made with it too"),
    "peft.use_loraplus": Meaning(ours="optim=lora_plus"),
    "peft.loraplus_lr_ratio": Meaning(ours="optim.lr_ratio=", means="with use_loraplus"),
    "peft.train_embeddings": Meaning(
        ours="peft.modules_to_save=[lm_head]", means="the output head is trained in full, and saved with the adapter"
    ),
    "peft.adalora": Meaning(means="refused: AdaLoRA is not here"),
}
"""Key -> what it is here, in the order of the page that lists them (docs/published-commands.md)."""

KINDS_OF_TYPES: Mapping[str, str | None] = {"CausalLM": None, "ConditionalGeneration": "seq2seq"}
"""``model.type`` -> our ``model.kind``, None where nothing is to be said."""
IMAGES = ("cifar10", "cifar100", "cars", "svhn", "dtd")
"""Data sets of images, of other models than language models."""


def options(group: str) -> list[str]:
    """The options of a group."""
    return sorted(path.stem for path in (FOLDER / group).glob("*.yaml"))
