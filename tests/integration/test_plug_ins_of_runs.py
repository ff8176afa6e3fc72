"""The law of plug-ins for runs: one line in a registry, and a run can use it with its settings; no edit anywhere else.

One start, optimizer, data set, evaluation, model and rule for ranks each, from outside of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from lorafa import LoraConfig, RankRule
from lorafa.calibration import RANK_RULES
from lorafa.calibration.ranking import Asked, Layer, Rule
from lorafa.cli.main import main
from lorafa.cli.settings import settings_help
from lorafa.conf.compose import compose
from lorafa.costs.accounting import adapter_cost
from lorafa.data import DATASETS
from lorafa.data.entry import DataSet, Wanted
from lorafa.data.records import Message, Record, Records
from lorafa.data.sources import load_records
from lorafa.errors import ConfigError
from lorafa.evals import EVALS
from lorafa.evals.by_length import Progress
from lorafa.evals.entry import Evaluation, Scores, Subject
from lorafa.initializers import INITIALIZERS
from lorafa.initializers.base import InitResult, initializer
from lorafa.models import MODELS
from lorafa.models.entry import KnownModel
from lorafa.models.load import resolve_model
from lorafa.models.shapes import shape_model
from lorafa.optimizers import OPTIMIZERS
from lorafa.optimizers.entry import OptimizerEntry
from lorafa.optimizers.state_bytes import Sizes
from lorafa.runs.record import RunDirectory
from lorafa.settings.checks import check_number
from lorafa.settings.typed import build, plain
from lorafa.spec import LayerSpec
from lorafa.train.recipe import lora_config
from lorafa.train.settings.optim import OptimConfig, pair_optimizer
from lorafa.train.settings.run import RunConfig
from toys.workplace import ROWS, make_workplace, metrics, read

# ---- one file of each: what its author writes -----------------------------------------------------------------------


@dataclass(frozen=True)
class ConstantSettings:
    """Of the start."""

    level: float = 0.5
    """Every entry of A."""

    def __post_init__(self) -> None:
        check_number("level", self.level, "a number > 0", 0)


@initializer(settings=ConstantSettings)
def constant(weight: Tensor, stats: Mapping[str, Tensor], spec: LayerSpec) -> InitResult:
    A_shape, B_shape = spec.stored_shapes(weight)
    level = (spec.settings or ConstantSettings()).level
    return InitResult(torch.full(A_shape, level), torch.zeros(B_shape))


@dataclass(frozen=True, kw_only=True)
class SignSettings:
    """Of the optimizer."""

    inertia: float = 0.5
    """Share of the sum of gradients that is kept."""


class SignSteps(torch.optim.Optimizer):
    """Every number moves by lr against the sign of a sum of its gradients."""

    def __init__(self, params: Any, lr: float, inertia: float) -> None:
        super().__init__(params, {"lr": lr, "inertia": inertia})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                total = self.state[p].setdefault("total", torch.zeros_like(p))
                total.mul_(group["inertia"]).add_(p.grad)
                p.sub_(group["lr"] * total.sign())


def make_signs(model: nn.Module, settings: SignSettings, *, lr: float, weight_decay: float) -> SignSteps:
    return SignSteps([p for p in model.parameters() if p.requires_grad], lr, settings.inertia)


def one_total(sizes: Sizes, settings: SignSettings) -> int:
    return sum(p.numel() * p.element_size() for p in sizes.trained)


SIGNS = OptimizerEntry(lr=3e-3, state=one_total, settings=SignSettings, make=make_signs)


@dataclass(frozen=True, kw_only=True)
class SumsSettings:
    """Of the data set."""

    add: int = 0
    """Added to the seed."""


def load_sums(wanted: Wanted, settings: SumsSettings) -> Records:
    rows = ROWS[settings.add :]
    made = [Record((Message("user", r["question"]), Message("assistant", r["answer"]))) for r in rows]
    count = wanted.train_size or len(made) - wanted.eval_size
    return Records(made[wanted.eval_size :][:count], made[: wanted.eval_size], f"{wanted.name} from {settings.add}")


SUMS = DataSet(load=load_sums, settings=SumsSettings)


@dataclass(frozen=True, kw_only=True)
class LengthSettings:
    """Of the evaluation."""

    most: int = 3
    """Records it is measured on."""


def asks(heldout: Sequence[Record], settings: LengthSettings) -> list[Record]:
    return list(heldout[: settings.most])


def check(subject: Subject, records: Sequence[Record], settings: LengthSettings) -> None:
    assert subject.tokenizer.pad_token_id is not None


def measure(
    subject: Subject, records: Sequence[Record], settings: LengthSettings, batch_size: int, progress: Progress
) -> Scores:
    lengths = [len(subject.tokenizer(record.question[-1].content)["input_ids"]) for record in records]
    progress(len(records), len(records))
    return Scores(f"{sum(lengths)} tokens", {"tokens": sum(lengths), "asked": len(lengths)})


LENGTH = Evaluation(asks=asks, check=check, measure=measure, settings=LengthSettings)


@dataclass(frozen=True)
class TurnsSettings:
    """Of the rule."""

    high: int = 3
    """Every other layer's rank."""


def measure_layer(layer: Layer, settings: TurnsSettings) -> Tensor:
    return layer.tensors["second_moment.C"]


def take_turns(asked: Asked) -> dict[str, int]:
    ranks = (asked.settings.high if number % 2 else asked.least for number in range(len(asked.layers)))
    return dict(zip(asked.layers, ranks, strict=True))


TURNS = Rule(
    choose=take_turns,
    measure=measure_layer,
    is_finite=lambda C: bool(C.isfinite().all()),
    also="second_moment",
    of="input",
    settings=TurnsSettings,
)

LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(autouse=True)
def registered(workplace: Path) -> Iterator[None]:
    """The one line of each."""
    toy = KnownModel(shape=LLAMA | {"num_attention_heads": 2}, fetch=lambda cache: workplace / "model")
    with ExitStack() as lines:
        lines.enter_context(INITIALIZERS.added("constant", constant))
        lines.enter_context(OPTIMIZERS.added("signs", SIGNS))
        lines.enter_context(DATASETS.added("sums", SUMS))
        lines.enter_context(EVALS.added("length", LENGTH))
        lines.enter_context(RANK_RULES.added("turns", TURNS))
        lines.enter_context(MODELS.added("toy-llama", toy))
        yield


CHOICES = [
    *("model=toy-llama", "data=sums", "data.add=2", "init=constant", "init.level=0.25", "init.ranks=turns"),
    *("init.high=2", "init.iters=2", "optim=signs", "optim.inertia=0.75", "eval=length", "eval.most=2"),
]


def test_settings_reach_what_was_registered_and_are_written_down() -> None:
    config = compose(CHOICES)
    assert (config.model.name, config.data.own) == ("toy-llama", SumsSettings(add=2))
    assert (config.init.own, config.init.own_of_rule) == (ConstantSettings(0.25), TurnsSettings(2))
    assert (config.optim.own, config.optim.lr) == (SignSettings(inertia=0.75), 3e-3)
    assert config.eval.own == LengthSettings(most=2)
    written = plain(config)
    assert (written["init"]["level"], written["init"]["high"], written["optim"]["inertia"]) == (0.25, 2, 0.75)
    assert build(RunConfig, yaml.safe_load(yaml.safe_dump(written))) == config


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("init=constant init.levle=1", r"'init\.levle' for init=constant \(found 1\)\. Did you mean 'level'\?"),
        ("init=constant init.level=0", r"init\.level must be a number > 0, found 0\.0"),
        ("init=pissa init.level=1", r"'init\.level' for init=pissa \(found 1\)\. It belongs to init=constant\."),
        ("optim=signs optim.betas=[0,0]", r"'optim\.betas' for optim=signs .* optim=signs has: name, .*, inertia\."),
        ("optim=signs optim.inertia=slow", r"optim\.inertia must be a number, found 'slow'"),
        ("data=sums data.templates=3", r"'data\.templates' for data=sums .* It belongs to data=word_problems\."),
        ("eval=length eval.extract=upstream", r"'eval\.extract' for eval=length .* It belongs to eval=gsm8k\."),
        ("init=constant init.ranks=turns init.hihg=1", r"'init\.hihg' for init=constant init\.ranks=turns .* 'high'\?"),
        ("optim=sings", r"optim has no option 'sings'\. Did you mean 'signs'\?"),
    ],
)
def test_the_settings_of_each_are_closed(override: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        compose(override.split())


def test_help_lists_them() -> None:
    text = " ".join(settings_help().split())
    for part in (
        "init=constant init.level=0.5 Every entry of A.",
        "optim=signs optim.lr=0.003 Its own rate, where none is given. optim.inertia=0.5 Share of the sum",
        "data=sums data.add=0 Added to the seed.",
        "eval=length eval.most=3 Records it is measured on.",
        "init.ranks=turns init.high=3 Every other layer's rank.",
        "model=minilm-l6|smollm2-135m|toy-llama, or a folder, a Hub id",
    ):
        assert part in text


def test_the_library_takes_them_by_name(workplace: Path) -> None:
    assert load_records("sums", train_size=2, eval_size=1, seed=0, add=1).source == "sums from 1"
    assert resolve_model("toy-llama") == workplace / "model"
    assert RankRule("turns", high=5).settings == TurnsSettings(5)
    assert LoraConfig(init_lora_weights="constant", init_config={"level": 2.0}).start_settings() == ConstantSettings(2)
    model = shape_model("toy-llama")
    cost = adapter_cost(model, lora_config(compose(["init=constant"])), OptimConfig(name="signs"))
    assert cost.state_bytes == cost.gradient_bytes > 0
    with pytest.raises(ConfigError, match=r"high is a setting of the rule 'turns', and 'budget' does not read it"):
        RankRule("budget", high=5)


def test_an_optimizer_gets_its_settings() -> None:
    model = nn.Linear(2, 2)
    optimizer = pair_optimizer(model, compose(["optim=signs", "optim.inertia=0.75", "optim.lr=0.5"]).optim)
    assert optimizer is not None
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["inertia"]) == (0.5, 0.75)


def test_a_run_uses_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, more = tmp_path / "run", ["peft.r=4", "peft.lora_dropout=0", "data.eval_size=4", "train.steps=2"]
    short = ["train.batch_size=2", "train.checkpoint_every=0", "optim.schedule=constant", "optim.warmup=0"]
    assert main(["train", *CHOICES, *more, *short, f"run_dir={run}"]) == 0
    result = read(run / "result.json")
    assert result["source"] == "sums from 2"
    assert (result["before"]["asked"], result["before"]["tokens"] > 0) == (2, True)
    assert set(result["start"]["ranks"].values()) == {1, 2}
    assert result["after"]["loss"] != result["before"]["loss"]
    assert "tokens, answer loss" in capsys.readouterr().out
    assert [row["lr"] for row in metrics(run)] == [3e-3, 3e-3]
    assert RunDirectory.open(run).config().init.own == ConstantSettings(0.25)
    assert main(["report", str(run)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ asked ")]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["asked", "2", "2"]
