"""Files of PEFT that carry what its model had carried before: read for what they are, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafa import PeftModel, get_peft_model, set_peft_model_state_dict
from lorafa.errors import CheckpointError
from lorafa.io.hotswap import hotswap_adapter_from_state_dict
from toys.adapters import train
from toys.compare import close, refused
from toys.models import AlikeMixture, Mixture
from toys.parity import quiet

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
MATRIX, UP, DOWN, MID = "experts.matrix", "experts.up", "experts.down", "experts.mid"
DELETED = [(), ((UP,),), ((DOWN,),), ((UP, DOWN),), ((MATRIX,), (DOWN,)), ((MATRIX, DOWN, UP),)]
"""Parameters of the adapters that were on the model before, one after the other, and were deleted."""
OWN = [(UP,), (DOWN,), (UP, DOWN), (MATRIX, DOWN), (MATRIX, UP, DOWN)]
CASES = [
    pytest.param(deleted, own, marks=[] if (row + column) % 3 == 0 else pytest.mark.slow)
    for row, deleted in enumerate(DELETED)
    for column, own in enumerate(OWN)
]
"""Every pair, of which a third is quick."""


def base(kind: type[nn.Module] = Mixture) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().eval()


def on(*parameters: str, **settings: Any) -> Any:
    return peft.LoraConfig(target_modules=[], target_parameters=list(parameters), r=2, lora_alpha=3, **settings)


def after(deleted: tuple[tuple[str, ...], ...], config: Any, kind: type[nn.Module] = Mixture) -> Any:
    """PEFT's model with one adapter, which is "default", after others have come and gone."""
    with quiet():
        model: Any = peft.PeftModel(base(kind), config) if not deleted else None
        for number, parameters in enumerate(deleted):
            if model is None:
                model = peft.get_peft_model(base(kind), on(*parameters), f"a{number}")
            else:
                model.add_adapter(f"a{number}", on(*parameters))
            model.delete_adapter(f"a{number}")
        if deleted:
            model.add_adapter("default", config)
        model.set_adapter("default")
    train(model)
    return model.eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    with quiet():
        model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def depths(tensors: dict[str, Tensor]) -> set[int]:
    return {key.count("base_layer") for key in tensors if ".lora_A" in key}


@pytest.mark.parametrize(("deleted", "own"), CASES, ids=str)
def test_files_of_any_history_load_where_shapes_say_whose_factors_they_are(
    deleted: tuple[tuple[str, ...], ...], own: tuple[str, ...], tmp_path: Path
) -> None:
    model = after(deleted, on(*own))
    tensors = saved(model, tmp_path)
    found = PeftModel.from_pretrained(base(), tmp_path)
    close(output(found), output(model))
    found.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert depths(again) == set(range(len(own)))
    with quiet():
        close(output(peft.PeftModel.from_pretrained(base(), tmp_path / "again")), output(model))
    filled, swapped = (get_peft_model(base(), on(*own)).eval() for _ in range(2))
    set_peft_model_state_dict(filled, tensors)
    hotswap_adapter_from_state_dict(swapped, tensors, "default", on(*own))
    close(output(filled), output(model))
    close(output(swapped), output(model))


def test_peft_itself_cannot_read_some_of_them(tmp_path: Path) -> None:
    """Which is what the test above is worth."""
    saved(after(((UP,),), on(UP, DOWN)), tmp_path)
    with quiet(), pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("later", [(MID,), (UP, MID), (UP, MID, DOWN)], ids="+".join)
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_layers_and_biases_inside_of_modules_that_others_have_wrapped_load(
    bias: str, later: tuple[str, ...], tmp_path: Path
) -> None:
    model = after((), peft.LoraConfig(target_modules=["gate"], r=2, bias=bias), AlikeMixture)
    with quiet():
        model.add_adapter("later", on(*later))
    tensors = saved(model, tmp_path)
    assert depths(tensors) == {len(later)}
    close(output(PeftModel.from_pretrained(base(AlikeMixture), tmp_path)), output(model))


def test_factors_of_equal_shapes_in_the_order_of_a_model_with_them_alone_load(tmp_path: Path) -> None:
    model = after((), on(UP, MID, DOWN), AlikeMixture)
    saved(model, tmp_path)
    close(output(PeftModel.from_pretrained(base(AlikeMixture), tmp_path)), output(model))


@pytest.mark.parametrize("deleted", [((UP, MID, DOWN),), ((MID,),), ((UP,), (MID,))], ids=str)
def test_factors_of_equal_shapes_whose_order_is_not_known_are_refused(
    deleted: tuple[tuple[str, ...], ...], tmp_path: Path
) -> None:
    assert depths(saved(after(deleted, on(UP, DOWN), AlikeMixture), tmp_path)) != {0, 1}
    text = "the adapters of down, up of 'experts' lie in it"
    fresh = base(AlikeMixture)
    with refused(fresh, CheckpointError, f"on which other adapters had been.*{text}.*key_mapping"):
        PeftModel.from_pretrained(fresh, tmp_path)


def test_one_sign_of_a_history_makes_all_equal_shapes_of_a_file_doubtful(tmp_path: Path) -> None:
    """Two experts' parameters at the usual depths, and a layer inside whose name shows a wrapper too many."""
    config = peft.LoraConfig(target_modules=["gate"], target_parameters=[UP, MID], r=2)
    tensors = saved(after((), config, AlikeMixture), tmp_path)
    odd = {key.replace("base_layer.gate", "base_layer.base_layer.base_layer.gate"): t for key, t in tensors.items()}
    assert odd.keys() != tensors.keys()
    save_file(odd, tmp_path / "adapter_model.safetensors")
    fresh = base(AlikeMixture)
    with refused(fresh, CheckpointError, "factors of equal shapes do not either"):
        PeftModel.from_pretrained(fresh, tmp_path)


def test_key_mapping_says_which_is_which(tmp_path: Path) -> None:
    model = after(((UP, MID, DOWN),), on(UP, DOWN), AlikeMixture)
    saved(model, tmp_path)
    mapping = {r"experts\.base_layer\.base_layer\.lora": "experts.base_layer.lora"}
    found = PeftModel.from_pretrained(base(AlikeMixture), tmp_path, key_mapping=mapping)
    close(output(found), output(model))
