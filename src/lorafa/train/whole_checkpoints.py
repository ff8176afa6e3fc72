"""WholeCheckpoints: makes a trainer of transformers write checkpoints that can be told to be whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from lorafa.errors import CheckpointError, LoraError, first_line
from lorafa.processes import barrier, from_main, is_main
from lorafa.train.checkpoints import (
    STATE_FILE,
    begin,
    drop_oldest,
    last_checkpoint,
    missing_files,
    newest_whole,
    put_aside_after,
    require_same_processes,
    seal,
    whole_or_none,
)


class WholeCheckpoints:
    """Stands before `transformers.Trainer` among the bases of a trainer.

    What a checkpoint holds is written down once all of it is on the disk (`lorafa.train.checkpoints`), and only then
    are older ones removed. A training is continued only from a whole one, by as many processes as wrote it.
    """

    args: Any
    state: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; ``resume_from_checkpoint=True`` continues from the newest whole checkpoint of ``output_dir``.

        Raises:
            CheckpointError: there is no whole checkpoint to resume from, or it does not fit the model.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(from_main(lambda: _to_resume(Path(self.args.output_dir))))
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        folder = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        limit, writes = self.args.save_total_limit, self.args.should_save
        with whole_or_none(checkpoint):
            if writes:
                begin(checkpoint)
            barrier()
            self.args.save_total_limit = None  # older ones stay until this one is whole
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self.args.save_total_limit = limit
            if writes:
                seal(checkpoint)
        if writes:
            drop_oldest(folder, limit, checkpoint, self.state.best_model_checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        barrier()  # before the first process says what the checkpoint holds

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._require_whole(Path(resume_from_checkpoint))
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _require_whole(self, checkpoint: Path) -> None:
        """Raises CheckpointError for a checkpoint that is not whole, or of another number of processes."""
        if missing := missing_files(checkpoint):
            newest = last_checkpoint(checkpoint.parent)
            raise CheckpointError(
                f"{checkpoint} is no complete checkpoint: {', '.join(missing)} missing or damaged, so the training "
                f"could not continue as it was. The newest complete checkpoint beside it: {newest or 'none'}."
            )
        require_same_processes(checkpoint)
        with _state_of_a_training(str(checkpoint)):
            transformers.TrainerState.load_from_json(str(checkpoint / STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _state_of_a_training(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _state_of_a_training(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        checkpoint = kwargs.get("resume_from_checkpoint", next(iter(args[3:4]), None))
        with _state_of_a_training(checkpoint):
            found = super()._init_training_state(*args, **kwargs)  # type: ignore[misc]
        if best := self.state.best_global_step:  # its path is as it was typed, from the folder one was in
            here = Path(self.args.output_dir) / f"checkpoint-{best}"
            if here.is_dir():
                self.state.best_model_checkpoint = str(here)
        return found


@contextmanager
def _state_of_a_training(checkpoint: str | None) -> Iterator[None]:
    """Raises CheckpointError for whatever reading a checkpoint raises: its files are as they were written, by digests
    beside them, but may hold anything."""
    try:
        yield
    except LoraError:
        raise
    except Exception as error:
        if checkpoint is None:
            raise
        raise CheckpointError(
            f"{checkpoint} does not hold the state of such a training: {type(error).__name__}: {first_line(error)} "
            "Resume from another checkpoint."
        ) from error


def _to_resume(folder: Path) -> Path:
    newest = newest_whole(folder)
    if newest is None:
        raise CheckpointError(f"There is no complete checkpoint to resume from in {folder}.")
    if is_main():
        put_aside_after(folder, newest)
    return newest
