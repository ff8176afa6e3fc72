"""Whatever a model carries and has carried, the file of an adapter is, byte for byte, that of a model with it alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    set_peft_model_state_dict,
)
from lorafa.errors import LoraError
from lorafa.storage.tensors import read_tensors
from lorafa.storage.whole import read_json
from toys.adapters import train
from toys.compare import close
from toys.models import Alike

IDS = torch.tensor([[1, 4, 7], [2, 2, 0]])
FILES = ("adapter_model.safetensors", "adapter_config.json")


class Router(nn.Module):
    """A module that multiplies with its weight itself, as routers of mixtures do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12) / 4)
        self.shift = nn.Parameter(torch.randn(12, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + x @ self.shift


class Everything(nn.Module):
    """An embedding whose head shares its table, stacks of experts of equal shapes with a layer inside, a router."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.q_proj, self.router, self.experts = nn.Linear(12, 12), Router(), Alike()
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 10, bias=False)
        self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.router(self.q_proj(self.embed(ids)))
        x = self.norm(self.experts(x.flatten(0, 1)).unflatten(0, ids.shape))
        y: Tensor = self.head(x)
        return y


def base() -> nn.Module:
    torch.manual_seed(0)
    return Everything().double().eval()


def on(*modules: str, parameters: tuple[str, ...] = (), **settings: Any) -> LoraConfig:
    return LoraConfig(
        **({"target_modules": list(modules), "target_parameters": list(parameters), "r": 2, "lora_alpha": 3} | settings)
    )


ADAPTERS: dict[str, Callable[[], LoraConfig]] = {
    "linear": lambda: on("q_proj", "gate"),
    "ranks of its own": lambda: on("q_proj", "gate", rank_pattern={"gate": 3}, alpha_pattern={"q_proj": 5}),
    "DoRA": lambda: on("q_proj", "gate", use_dora=True),
    "start": lambda: on("q_proj", init_lora_weights="pissa"),
    "biases": lambda: on("gate", bias="all"),
    "biases of its layers": lambda: on("gate", bias="lora_only"),
    "up and down": lambda: on(parameters=("experts.up", "experts.down")),
    "down, mid and gate": lambda: on("gate", parameters=("experts.down", "experts.mid"), rank_pattern={"mid": 1}),
    "all three": lambda: on("q_proj", parameters=("up", "mid", "down")),
    "router": lambda: on(parameters=("router.weight",)),
    "both of the router": lambda: on(parameters=("router.weight", "router.shift", "experts.up")),
    "table": lambda: on("embed", "q_proj"),
    "tied table": lambda: on("embed", ensure_weight_tying=True),
    "head": lambda: on("head"),
    "rows": lambda: on("q_proj", trainable_token_indices=[1, 4]),
    "other rows": lambda: on("gate", trainable_token_indices=[2]),
    "copies": lambda: on("q_proj", modules_to_save=["norm"]),
    "copy of the head": lambda: on("q_proj", modules_to_save=["head", "norm"]),
    "copy of the router": lambda: on("q_proj", modules_to_save=["router"]),
}


Files = tuple[Any, bytes, bytes]


def files(model: PeftModel, name: str, folder: Path) -> Files:
    """The header of the tensors, whose two texts safetensors writes in any order; their bytes; those of the config."""
    model.save_pretrained(folder, selected_adapters=[name])
    content, config = ((folder / name / file).read_bytes() for file in FILES)
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :], config


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two folders."""
    sides = [(*read_tensors(folder / FILES[0]), read_json(folder / FILES[1])) for folder in (one, other)]
    (tensors, header, config), (tensors2, header2, config2) = sides
    none = torch.zeros(0)
    every = tensors.keys() | tensors2.keys()
    keys = [key for key in every if not torch.equal(tensors.get(key, none), tensors2.get(key, none))]
    fields = [f"{key}: {config[key]} {config2[key]}" for key in config if config[key] != config2.get(key)]
    return [*keys, *fields, *([] if header == header2 else [str(header), str(header2)])]


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Files, Tensor]]:
    """Of each adapter its folder, its files, and what a model computes that carries it alone."""
    found = {}
    for number, (kind, config) in enumerate(ADAPTERS.items()):
        folder = tmp_path_factory.mktemp(f"kind{number}")
        model = get_peft_model(base(), config(), adapter_name="own").eval()
        train(model)
        found[kind] = folder / "own", files(model, "own", folder), output(model)
    return found


class History:
    """A model on which adapters come and go by chance; what is refused changes nothing and is passed over."""

    def __init__(self, seed: int, alone: dict[str, tuple[Path, Files, Tensor]]) -> None:
        self.random, self.alone = random.Random(seed), alone
        self.model = get_peft_model(base(), self.config(), adapter_name="first").eval()
        self.done: list[str] = []
        self.count = 0

    def config(self) -> LoraConfig:
        return ADAPTERS[self.random.choice(list(ADAPTERS))]()

    def others(self) -> list[str]:
        return [name for name in self.model.peft_config if name != "own"]

    def add(self) -> None:
        self.count += 1
        self.model.add_adapter(f"other{self.count}", self.config())

    def load(self) -> None:
        self.count += 1
        self.model.load_adapter(self.alone[self.random.choice(list(ADAPTERS))][0], f"other{self.count}")

    def delete(self) -> None:
        if self.others():
            self.model.delete_adapter(self.random.choice(self.others()))

    def set(self) -> None:
        self.model.set_adapter(self.random.choice(list(self.model.peft_config)))

    def train(self) -> None:
        """Of another adapter than the one in question."""
        name = self.random.choice(self.others() or [""])
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if name in key.split("."):
                    parameter.add_(0.1)

    def merge(self) -> None:
        self.model.merge_adapter([self.random.choice(list(self.model.peft_config))])

    def unmerge(self) -> None:
        self.model.unmerge_adapter()

    def disable(self) -> None:
        with self.model.disable_adapter():
            output(self.model)

    def combine(self) -> None:
        self.model.add_weighted_adapter(self.others()[:1], [0.5], f"sum{self.count}", combination_type="cat")

    def go_on(self, steps: int) -> None:
        usual = [self.add, self.load, self.delete, self.set, self.train, self.merge, self.unmerge]
        every = [*usual, self.add, self.delete, self.disable, self.combine]
        for _ in range(steps):
            step = self.random.choice(every)
            try:
                step()
                self.done.append(step.__name__)
            except (LoraError, IndexError):
                self.done.append(f"({step.__name__})")

    def bring(self, kind: str) -> bool:
        """Put the adapter in question on, by one of the ways there are; whether it goes on this model."""
        folder = self.alone[kind][0]
        self.model.unmerge_adapter()
        try:
            if self.random.random() < 0.4:
                self.model.load_adapter(folder, "own")
            else:
                self.model.add_adapter("own", ADAPTERS[kind]())
                way = self.random.choice([self.by_state, self.by_swap, self.by_file])
                way(kind)
        except LoraError as error:
            self.done.append(str(error))
            assert "own" not in self.model.peft_config
            return False
        return True

    def by_state(self, kind: str) -> None:
        source = PeftModel.from_pretrained(base(), self.alone[kind][0], adapter_name="own")
        set_peft_model_state_dict(self.model, get_peft_model_state_dict(source, adapter_name="own"), "own")

    def by_swap(self, kind: str) -> None:
        hotswap_adapter(self.model, self.alone[kind][0], "own")

    def by_file(self, kind: str) -> None:
        self.model.load_adapter(self.alone[kind][0], "own")


SEEDS = [pytest.param(seed, marks=[] if seed == 0 else pytest.mark.slow) for seed in range(30)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_files_do_not_depend_on_the_history(kind: str, seed: int, alone: Any, tmp_path: Path) -> None:
    history = History(1000 * seed + list(ADAPTERS).index(kind), alone)
    history.go_on(history.random.randrange(8))
    while not history.bring(kind):
        if not history.others():
            return
        history.model.unmerge_adapter()
        history.delete()
    history.go_on(history.random.randrange(8))
    folder, expected, computed = alone[kind]
    found = files(history.model, "own", tmp_path)
    assert found == expected, (history.done, differences(folder, tmp_path / "own"))
    close(output(PeftModel.from_pretrained(base(), tmp_path / "own")), computed)
    if all(history.model.peft_config[name].bias == "none" for name in history.others()):  # there is one set of them
        history.model.unmerge_adapter()
        history.model.set_adapter("own")
        close(output(history.model), computed)
