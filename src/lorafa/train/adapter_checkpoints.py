"""AdapterCheckpoints: makes any trainer built on `transformers.Trainer` save, resume and reload adapters alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from accelerate.utils import DistributedType
from torch import nn

from lorafa.errors import ConfigError
from lorafa.launch import launch_of
from lorafa.peft_model import PeftModel
from lorafa.processes import world_size
from lorafa.surgery.gradients import check_gradients
from lorafa.train.sharding import Sharding, asked_for, average_gradients, hidden_from_accelerate
from lorafa.train.whole_checkpoints import WholeCheckpoints


class AdapterCheckpoints(WholeCheckpoints):
    """Put it before a trainer: ``class MyTrainer(AdapterCheckpoints, SFTTrainer): ...``.

    `transformers.Trainer` and what is built on it recognise PEFT's own class only. With this in front of them they see
    the transformers model inside a `lorafa.PeftModel` when they look at what they were given, train the PeftModel, and

    * write ``adapter_config.json`` and ``adapter_model.safetensors`` of every adapter into a checkpoint ("default" into
      the folder itself, others into sub-folders), with nothing of the base, so that `PeftModel.from_pretrained` reads
      it;
    * resume from it, several adapters and ``modules_to_save`` included, and only if it is complete;
    * load the best one at the end (``load_best_model_at_end``);
    * stop before the first step if an adapter has no gradient (:func:`lorafa.check_gradients`), as one on ``lm_head``
      has none where the trainer multiplies by the head's weight itself.

    PEFT's model may be given too. With several processes a checkpoint is continued by as many. Under FSDP2 the base is
    spread over them and what is trained stays whole (`lorafa.train.sharding`). Resuming under the first FSDP and
    DeepSpeed is not supported.

    Args:
        check_gradients: make that check; turn it off where some adapter is rightly without a gradient, as in a part of
            the model that the first batch does not use. It is not made under DeepSpeed, which keeps gradients itself.

    Raises:
        ConfigError: the model has no adapters, or a class names its trainer before this one.
    """

    _zero_gradients_are_right: ClassVar[bool] = True
    """Whether a loss may rightly give no gradient: preferences without a margin, rewards without an advantage."""
    _sharding: Sharding | None = None
    """How the model is to be spread over processes; None where it is not."""
    _sharded = False
    """Whether it is."""
    _kept_whole: Sequence[nn.Parameter] = ()
    """What is not spread then, and whose gradients are averaged here."""
    accelerator: Any
    args: Any
    model: Any
    state: Any
    processing_class: Any
    data_collator: Any
    lr_scheduler: Any

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        order = cls.__mro__
        if transformers.Trainer in order[: order.index(AdapterCheckpoints)]:
            raise ConfigError(
                f"{cls.__name__} names its trainer before AdapterCheckpoints, which then changes nothing. "
                f"Name it first: class {cls.__name__}(AdapterCheckpoints, ...)."
            )

    def __init__(self, model: Any = None, *args: Any, check_gradients: bool = True, **settings: Any) -> None:
        self.check_gradients = check_gradients
        wraps = isinstance(model, PeftModel)
        super().__init__(model.get_base_model() if wraps else model, *args, **settings)  # type: ignore[call-arg]
        if wraps:
            self.model = self.model_wrapped = model
        if not (hasattr(self.model, "get_base_model") and hasattr(self.model, "load_adapter")):
            raise ConfigError(
                f"{type(self).__name__} trains adapters, found a plain {type(self.model).__name__}. "
                "Wrap it first: model = get_peft_model(model, LoraConfig(...))."
            )

    def create_accelerator_and_postprocess(self) -> None:
        torch.device(self.args.device)  # accelerate makes its group of processes when this is asked for
        self._sharding = asked_for(self.args)
        with nullcontext() if self._sharding is None else hidden_from_accelerate(self.args):
            super().create_accelerator_and_postprocess()  # type: ignore[misc]
        launch = launch_of(os.environ)
        started = 1 if launch is None or launch.launcher == "srun" else launch.size  # srun's may know nothing of others
        size = max(started, world_size())
        if self.accelerator.num_processes < size:
            raise ConfigError(
                f"This is one of {size} processes, and accelerate trains in it alone. On CPUs tell it of the others: "
                "TrainingArguments(use_cpu=True)."
            )

    def _move_model_to_device(self, model: nn.Module, device: Any) -> None:
        if self._sharding is None:  # otherwise the part that this process holds is
            super()._move_model_to_device(model, device)  # type: ignore[misc]

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if self._sharding is None:
            return super()._wrap_model(model, training=training, dataloader=dataloader)  # type: ignore[misc,no-any-return]
        if not self._sharded:
            self._kept_whole = self._sharding.shard(self.model, self.args.device)
            self.model._is_accelerate_prepared = self._sharded = True  # so that accelerate wraps it no more
        return model

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self._sharding is not None and self.accelerator.sync_gradients:
            average_gradients(self._kept_whole)
        kept = self.accelerator.distributed_type != DistributedType.DEEPSPEED
        if self.check_gradients and kept and self.accelerator.sync_gradients and self.state.global_step == 0:
            check_gradients(self.model, zeros=self._zero_gradients_are_right)
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save and not self._sharded:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        self.model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if not self.args.should_save:
            return
        tokenizer = self.processing_class
        if tokenizer is None:
            tokenizer = getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._require_whole(folder)
        self._load_adapters(folder)

    def _load_best_model(self) -> None:
        self._load_adapters(Path(self.state.best_model_checkpoint))

    def _load_adapters(self, folder: Path) -> None:
        """Load every adapter of the model from where ``save_pretrained`` puts it; trained ones stay trainable."""
        active = self.model.active_adapters
        for name in self.model.peft_config:
            place = folder if name == "default" else folder / name
            self.model.load_adapter(str(place), name, is_trainable=name in active)
