"""Two processes train every start and take every optimizer as one does, with the base whole (DDP) or spread (FSDP2).

Each trains on half of a batch, up to a last one that no whole round of rows is left for. A training that is continued
from a checkpoint ends with the same bits, in one process and in two.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import ConfigError
from lorafa.optimizers import OPTIMIZERS
from lorafa.processes import world_size
from lorafa.train.settings.optim import OptimConfig, pair_optimizer, stock_arguments
from lorafa.train.sharding import ASKED
from lorafa.train.trainer import LoraTrainer
from toys.adapters import STARTS, read_by, settings_of, stats_for
from toys.compare import trained_values
from toys.data import collate, samples
from toys.processes import enter_group, leave_group, run_group
from toys.training import CONFIG

ROWS, STEPS, SAVED = 7, 4, 2
FORMS: dict[str, dict[str, Any]] = {
    "lora_fa fold": {"name": "lora_fa", "own": {"algorithm": "fold"}},
    "lora_pro full": {"name": "lora_pro", "own": {"form": "full"}},
    "lora_pro sgd": {"name": "lora_pro", "own": {"form": "sgd"}},
}
TRAINED: dict[str, dict[str, Any]] = {name: {"name": name} for name in OPTIMIZERS.names()} | FORMS
CASES = ["every start", "dropout", "accumulation", *(f"optimizer {name}" for name in TRAINED)]
TARGETS = ("q_proj", "v_proj")


def adapted(case: str) -> PeftModel:
    """One adapter, or one for each start, on a layer of its own."""
    torch.manual_seed(0)
    starts = STARTS if case == "every start" else [True]
    config = hf.LlamaConfig(**CONFIG.to_dict() | {"num_hidden_layers": max(2, len(starts))})
    base: nn.Module = hf.LlamaForCausalLM(config).double()
    layers = {path: m for path, m in base.named_modules() if path.rpartition(".")[2] in TARGETS}
    stats = {path: stats_for(layer.weight) for path, layer in layers.items()}  # type: ignore[arg-type]
    model: PeftModel | None = None
    for number, start in enumerate(starts):
        settings = settings_of(start) | ({"layers_to_transform": [number]} if len(starts) > 1 else {})
        dropout = 0.3 if case == "dropout" else 0.0
        adapter = LoraConfig(r=2, target_modules=list(TARGETS), init_seed=0, lora_dropout=dropout, **settings)
        given = {path: of for path, of in stats.items() if len(starts) == 1 or f".{number}." in path}
        if model is None:
            model = get_peft_model(base, adapter, stats=read_by(start, given))
        else:
            model.add_adapter(f"start_{start}", adapter, stats=read_by(start, given))
    assert model is not None
    model.base_model.set_adapter(list(model.peft_config))
    return model


def trainer(case: str, folder: Path) -> LoraTrainer:
    model, kind = adapted(case), case.partition(" ")
    optim = OptimConfig(lr=1e-2, **(TRAINED[kind[2]] if kind[0] == "optimizer" else {}))
    arguments = hf.TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=SAVED, per_device_train_batch_size=2 // world_size(), use_cpu=True,
        gradient_accumulation_steps=2 if case == "accumulation" else 1, report_to="none", disable_tqdm=True,
        logging_steps=1, log_level="error", seed=3, **stock_arguments(optim),
    )  # fmt: skip
    return LoraTrainer(
        model, arguments, rules=2, train_dataset=samples(ROWS), data_collator=collate, trial=None,
        optimizers=(pair_optimizer(model, optim), None),
    )  # fmt: skip


def losses(ran: LoraTrainer) -> list[float]:
    return [row["loss"] for row in ran.state.log_history if "loss" in row]


Found = dict[str, Any]


def found_of(case: str, folder: Path) -> Found:
    """Losses and weights of a training, and the weights it has when it is continued half-way."""
    whole = trainer(case, folder)
    whole.train()
    assert whole.own_loss_reason is None
    again = trainer(case, folder)
    torch.manual_seed(99)  # as in another process, with other random numbers
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED}"))
    spread = [name for name, p in whole.model.named_parameters() if hasattr(p, "full_tensor")]
    return {
        "losses": losses(whole), "trained": trained_values(whole.model), "continued": trained_values(again.model),
        "spread": spread,
    }  # fmt: skip


@contextmanager
def asked(way: str) -> Iterator[None]:
    if way == "FSDP2":
        os.environ.update({ASKED: "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"})
    try:
        yield
    finally:
        os.environ.pop(ASKED, None)


WAYS = ("DDP", "FSDP2")


def work(rank: int, folder: str) -> None:
    place = Path(folder)
    enter_group(rank, place)
    hf.logging.set_verbosity_error()
    for way in WAYS:
        for case in CASES:
            with asked(way):
                found = found_of(case, place / way / case)
            torch.distributed.barrier()
            torch.save(found, place / f"{way} {case} {rank}.pt")
    try:
        arguments = hf.TrainingArguments(str(place / "alone"), report_to="none")
        LoraTrainer(adapted("dropout"), arguments, train_dataset=samples(ROWS), data_collator=collate)
    except ConfigError as error:
        (place / f"alone {rank}.txt").write_text(str(error))
    leave_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_group(work, str(folder))
    return folder


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    folder = tmp_path_factory.mktemp("one")
    return {case: found_of(case, folder / case) for case in CASES}


@pytest.mark.matrix(14, each_word=False)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(of_one: dict[str, Found], of_two: Path, case: str, way: str) -> None:
    first, second = (torch.load(of_two / f"{way} {case} {rank}.pt") for rank in range(2))
    spread = first.pop("spread")
    assert bool(spread) == (way == "FSDP2")
    assert second.pop("spread") == spread
    assert not any("lora_" in name for name in spread)
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # what is trained is whole in each
    torch.testing.assert_close(first["continued"], first["trained"], rtol=0, atol=0)
    if case != "dropout":  # which masks other rows
        assert first["losses"] == pytest.approx(of_one[case]["losses"], rel=1e-6)
        torch.testing.assert_close(first["trained"], of_one[case]["trained"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_one_process_continues_with_the_same_bits(of_one: dict[str, Found], case: str) -> None:
    torch.testing.assert_close(of_one[case]["continued"], of_one[case]["trained"], rtol=0, atol=0)


def test_a_process_of_two_that_would_train_alone_is_refused(of_two: Path) -> None:
    """On CPUs accelerate makes a group only where it is told that they are meant."""
    text = "This is one of 2 processes, and accelerate trains in it alone. On CPUs tell it of the others: Training"
    assert all(text in (of_two / f"alone {rank}.txt").read_text() for rank in range(2))
