"""Intruder reduction beside PEFT's, on linear layers, where PEFT's is right; and its files of our copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorafa import LoraConfig, PeftModel, get_peft_model, reduce_intruder_dimension
from lorafa.surgery.walk import lora_layers
from toys.compare import close
from toys.models import Two
from toys.parity import quiet, trained

peft = pytest.importorskip("peft")

TARGETS = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"]}


def both(folder: Path, **settings: Any) -> tuple[PeftModel, Any]:
    """The same adapter, that has left its start, in both libraries."""
    torch.manual_seed(0)
    trained(get_peft_model(Two().double(), LoraConfig(**TARGETS | settings))).save_pretrained(folder)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(Two().double(), folder)
    return PeftModel.from_pretrained(Two().double(), folder), theirs


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("lam", [1.0, 0.75, 0.0])
@pytest.mark.parametrize("epsilon", [0.5, 0.8, 0.95])
def test_the_update_is_that_of_peft(tmp_path: Path, rslora: bool, lam: float, epsilon: float) -> None:
    from peft.tuners.lora.intruders import reduce_intruder_dimension as of_peft

    ours, theirs = both(tmp_path, use_rslora=rslora)
    ours_said, theirs_said = [], []
    settings = {"top_k": 6, "threshold_epsilon": epsilon, "mitigation_lambda": lam}
    reduce_intruder_dimension(ours, logging_sink=ours_said.append, **settings)
    with quiet():
        of_peft(theirs, logging_sink=theirs_said.append, **settings)
    assert ours.active_adapter == theirs.active_adapter == "intruder_reduced"
    for path, layer in lora_layers(ours.get_base_model()):
        other = theirs.base_model.model.get_submodule(path).get_delta_weight("intruder_reduced")
        close(layer.get_delta_weight("intruder_reduced"), other, 1e-6)
    counts = [word.partition(": ")[2].partition(",")[0] for word in ours_said[:-1]]
    assert counts == [word.partition(": ")[2] for word in theirs_said[:-1]]
    assert ours_said[-1] == theirs_said[-1]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"use_rslora": True}])
def test_peft_computes_with_the_file_of_the_copy(tmp_path: Path, settings: dict[str, Any], exact: bool) -> None:
    torch.manual_seed(0)
    model = trained(get_peft_model(Two().double(), LoraConfig(**TARGETS | settings))).eval()
    done = reduce_intruder_dimension(model, threshold_epsilon=0.95, logging_sink=None, exact=exact)
    assert done.intruders
    model.save_pretrained(tmp_path, selected_adapters=["intruder_reduced"])
    x = torch.randn(5, 12, dtype=torch.float64)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(Two().double(), tmp_path / "intruder_reduced")
    close(theirs(x), model(x), 1e-6)
