"""Trackers whose callbacks transformers has."""

from __future__ import annotations

import os
from collections.abc import Callable

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from lorafa.storage.paths import user_path
from lorafa.train.trackers.entry import Reported, Tracker


def _tensorboard(reported: Reported) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or reported.folder / "tensorboard"
    # steps after the checkpoint that a part cut short has logged are made, and logged, again
    again = reported.step + 1 if reported.step else None
    return TensorBoardCallback(SummaryWriter(str(user_path(folder)), purge_step=again))  # type: ignore[no-untyped-call]


def _named(name: str) -> Callable[[Reported], TrainerCallback]:
    return lambda _: get_reporting_integration_callbacks([name])[0]()


def _for_wandb(reported: Reported) -> dict[str, str]:
    continued = {"WANDB_RUN_ID": reported.identity, "WANDB_RESUME": "allow"}
    return {"WANDB_PROJECT": reported.project, "WANDB_DIR": str(reported.folder), **continued}


def _end_wandb(reported: Reported, failed: bool) -> None:
    import wandb

    if wandb.run is not None and wandb.run.id == os.environ.get("WANDB_RUN_ID"):  # else it is the user's own
        wandb.finish(exit_code=int(failed))


def _end_mlflow(reported: Reported, failed: bool) -> None:
    import mlflow

    run = mlflow.active_run()
    if failed and run is not None and run.info.run_name == reported.folder.name:
        mlflow.end_run("FAILED")


def _end_trackio(reported: Reported, failed: bool) -> None:
    import trackio

    if failed:
        trackio.finish()


TENSORBOARD = Tracker(package="tensorboard", make=_tensorboard)
WANDB = Tracker(package="wandb", make=_named("wandb"), environment=_for_wandb, end=_end_wandb)
TRACKIO = Tracker(
    package="trackio", make=_named("trackio"), arguments=lambda run: {"project": run.project}, end=_end_trackio
)
MLFLOW = Tracker(
    package="mlflow",
    make=_named("mlflow"),
    environment=lambda run: {"MLFLOW_EXPERIMENT_NAME": run.project},
    end=_end_mlflow,
)
