"""Arrow beside PEFT: the same adapters give the same outputs, up to PEFT's power iterations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorafa
from toys.adapters import train
from toys.language_models import IDS, llama
from toys.parity import quiet

peft = pytest.importorskip("peft")


def adapters(folder: Path, count: int, first: int = 0) -> list[str]:
    """Adapters of rank 2 whose two singular values differ enough for 15 power iterations."""
    paths = []
    for seed in range(first, first + count):
        config = lorafa.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"], init_seed=seed)
        model = lorafa.get_peft_model(llama(), config)
        torch.manual_seed(seed)
        train(model)
        with torch.no_grad():
            for _, layer in model.base_model.lora_layers():
                A = layer.lora_A["default"].weight
                B = layer.lora_B["default"].weight
                U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
                A.copy_(Vh[:2])
                B.copy_(U[:, :2] * torch.stack([S[0], S[0] / 2]))
        model.save_pretrained(folder / f"a{seed}")
        paths.append(str(folder / f"a{seed}"))
    return paths


def both(folder: Path, general: int = 0, **settings: Any) -> tuple[Any, Any]:
    tasks, others = adapters(folder, 4), adapters(folder, general, first=4) or None
    with quiet():
        theirs = peft.create_arrow_model(llama(), tasks, peft.ArrowConfig(rng_seed=0, **settings), others)
        ours = lorafa.create_arrow_model(llama(), tasks, lorafa.ArrowConfig(rng_seed=0, **settings), others)
    return ours, theirs


@pytest.mark.parametrize(
    "settings", [{"top_k": 1}, {"top_k": 2, "router_temperature": 0.25}, {}, {"top_k": 4}], ids=str
)
def test_outputs_are_those_of_peft(tmp_path: Path, settings: dict[str, Any]) -> None:
    ours, theirs = both(tmp_path, **settings)
    with torch.no_grad():
        found, wanted, base = ours(IDS).logits, theirs.eval()(input_ids=IDS).logits, llama().eval()(IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (found - base).abs().max() > 0.03
    assert list(ours.peft_config) == list(theirs.peft_config)
    assert ours.active_adapters == theirs.active_adapters


def test_prototypes_are_those_of_peft_up_to_their_sign(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path)
    theirs.eval()(input_ids=IDS)
    for path, layer in ours.base_model.lora_layers():
        other = theirs.base_model.model.get_submodule(path).lora_arrow["arrow_router"].prototypes
        mine = layer.lora_arrow["arrow_router"].weight
        torch.testing.assert_close((mine * other).sum(1).abs(), torch.ones(4), rtol=1e-5, atol=1e-5)


def test_genknowsub_gives_the_outputs_of_peft_and_leaves_the_adapters_alone(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, general=2, use_gks=True, top_k=4, router_temperature=100.0)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with torch.no_grad():
        found, wanted = ours(IDS).logits, theirs.eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    changed = theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_A["task_0"].weight
    assert not torch.equal(changed, before["base_model.model.model.layers.0.self_attn.q_proj.lora_A.task_0.weight"])


def test_an_adapter_added_or_deleted_later_is_followed_alike(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, top_k=2)
    (path,) = adapters(tmp_path, 1, first=9)
    for model in (ours, theirs):
        with quiet(), torch.no_grad():
            model.eval()(input_ids=IDS)
            model.delete_adapter("task_1")  # which PEFT notices when another is added
            model.load_adapter(path, adapter_name="late")
            model.set_adapter("arrow_router")
    with torch.no_grad():
        torch.testing.assert_close(
            ours(IDS).logits, theirs.eval()(input_ids=IDS).logits, rtol=1e-4, atol=1e-4
        )
