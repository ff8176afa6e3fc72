"""fully_shard (FSDP2) around an adapted model, two processes: gradients are those of one, and so are the files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from lorafa import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from lorafa.errors import CheckpointError
from toys.adapters import train
from toys.processes import leave_group, run_group

VOCABULARY, DIM = 12, 8
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "pissa": {"init_lora_weights": "pissa"},
    "kasa": {"init_lora_weights": "kasa"},
    "dora": {"use_dora": True},
    "bias": {"bias": "all", "lora_bias": True},
    "frozen A": {"freeze_A": True},
    "copies": {"modules_to_save": ["norm", "head"]},
    "rows": {"trainable_token_indices": [3, 4]},
    "embedding": {"target_modules": ["embed", "first"]},
    "one for both ends": {"target_modules": ["embed"], "ensure_weight_tying": True},
    "attention": {"target_modules": ["attention"]},
    "parameter": {"target_modules": [], "target_parameters": ["first.weight"]},
}
TIED = ("rows", "one for both ends")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.first, self.second = nn.Linear(DIM, 6), nn.Linear(6, DIM)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + self.second(self.first(self.norm(x)).tanh())


class Model(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, DIM)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


IDS = torch.arange(24).view(4, 6) % VOCABULARY


def base(case: str) -> Model:
    return Model(tied=case in TIED)


def adapted(case: str) -> PeftModel:
    settings = {"r": 2, "target_modules": ["first", "second"], "init_seed": 1, "init_lora_weights": False} | CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(case), LoraConfig(**settings))
    torch.manual_seed(2)
    train(model, 0.2)
    return model


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def sharded(model: PeftModel) -> PeftModel:
    for block in model.get_base_model().blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compared(case: str, rank: int, folder: Path) -> Iterator[str]:
    """What is wrong, in words."""
    one, many = adapted(case), adapted(case)
    loss(one, IDS).backward()
    outputs = one(IDS).detach()
    sharded(many)
    if not torch.allclose(many(IDS), outputs, atol=1e-5):
        yield "other outputs"
    loss(many, IDS.chunk(2)[rank]).backward()  # each process has half of the batch, and gradients are averaged
    wanted = {name: p.grad for name, p in one.named_parameters() if p.requires_grad}
    for name, parameter in many.named_parameters():
        if name not in wanted:
            continue
        size = 1 + float(wanted[name].abs().max())
        if parameter.grad is None or not torch.allclose(whole(parameter.grad), wanted[name], atol=1e-5 * size):
            yield f"another gradient of {name}"
    one.save_pretrained(folder / f"{case} one")
    many.save_pretrained(folder / f"{case} together", is_main_process=rank == 0)
    found = get_peft_model_state_dict(many)
    if any(hasattr(value, "full_tensor") for value in found.values()):
        yield "a state dict of parts"
    state = get_model_state_dict(many, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    dist.barrier()
    if rank == 0:  # alone, as the others have nothing to say
        many.save_pretrained(folder / f"{case} gathered", state_dict=state)
        for way in ("together", "gathered"):
            again = PeftModel.from_pretrained(base(case), folder / f"{case} {way}")
            if not torch.allclose(again(IDS), outputs, atol=1e-5):
                yield f"{way}: other outputs when it is loaded"
            if header(folder / f"{case} {way}") != header(folder / f"{case} one"):
                yield f"{way}: another header"
    dist.barrier()
    try:
        many.load_adapter(folder / f"{case} one", "default")
        yield "filled, though sharded"
    except CheckpointError as error:
        if "Load the file before the model is sharded" not in str(error):
            yield f"another error: {error}"


def header(folder: Path) -> Any:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["lorafa"])


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    wrong = {}
    for case in CASES:
        try:
            wrong[case] = list(compared(case, rank, Path(folder)))
        except Exception as error:  # both raise it, or the other waits for the timeout
            wrong[case] = [f"{type(error).__name__}: {error}"]
            dist.barrier()
    Path(folder, f"wrong-{rank}.json").write_text(json.dumps(wrong))
    leave_group()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("fsdp2")
    run_group(work, str(folder))
    found = [json.loads((folder / f"wrong-{rank}.json").read_text()) for rank in range(2)]
    return {case: [text for said in found for text in said.get(case, ["not reached"])] for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_sharded_training_and_its_files_are_those_of_one_process(wrong: dict[str, list[str]], case: str) -> None:
    assert wrong[case] == []
