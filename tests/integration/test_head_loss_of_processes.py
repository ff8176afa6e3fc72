"""The loss at supervised positions where FSDP2 has spread the head: by itself, with the norm before it, or with all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.models.head_loss import supervised_loss, supports_chunked_loss
from toys.language_models import IDS, llama
from toys.processes import enter_group, leave_group, run_group

CASES = ("head alone", "norm and head", "with all", "tied")
STEPS = 2


def adapted(case: str) -> PeftModel:
    model: PeftModel = get_peft_model(
        llama(tie_word_embeddings=case == "tied").double(), LoraConfig(r=2, target_modules=["q_proj"], init_seed=0)
    )
    return model


def spread(model: PeftModel, case: str) -> PeftModel:
    base: Any = model.get_base_model()
    options = {"ignored_params": {p for p in model.parameters() if p.requires_grad}}
    for block in base.model.layers:
        fully_shard(block, **options)
    if case == "head alone":
        fully_shard(base.lm_head, **options)
    if case == "norm and head":
        fully_shard([base.model.norm, base.lm_head], **options)
    fully_shard(model, **options)
    return model


def batch() -> dict[str, Tensor]:
    return {"input_ids": IDS, "labels": IDS.masked_fill(IDS == 1, -100)}


def losses(model: PeftModel) -> list[float]:
    """Of some steps: what one leaves of the model is what the next one finds."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = supervised_loss(model, batch(), chunk_tokens=3)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(loss.item())
    return found


def work(rank: int, folder: str) -> None:
    enter_group(rank, Path(folder))
    found: dict[str, Any] = {}
    for case in CASES:
        model = spread(adapted(case), case)
        found[case] = [supports_chunked_loss(model), losses(model)]
    Path(folder, f"found-{rank}.json").write_text(json.dumps(found))
    leave_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("group")
    run_group(work, str(folder))
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_a_spread_head_gives_the_loss_of_a_whole_one(found: list[dict[str, Any]], case: str) -> None:
    wanted = losses(adapted(case))
    assert wanted[0] != wanted[1]
    for reason, of_process in (one[case] for one in found):
        assert reason is None
        assert of_process == pytest.approx(wanted, rel=1e-9)
