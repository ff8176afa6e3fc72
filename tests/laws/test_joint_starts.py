"""The law of joint starts: two sketches added up are the sketch of the joint objective, for any weight, in float64."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lorafa
from lorafa import JointStart, LoraConfig, RankRule, collect_joint_statistics, collect_statistics, initialize
from lorafa.alignment import Alignment
from lorafa.alignment.balance import balanced_weight
from lorafa.alignment.teachers.snapshot import Snapshot
from lorafa.calibration.gradient import gradient_triplets
from lorafa.errors import CalibrationError, ConfigError, DivergedError
from lorafa.models.head_loss import supervised_loss
from toys.compare import assert_unchanged, close, everything
from toys.language_models import adapted

TARGETS = ["c_attn", "mlp.c_proj"]


def student(**options: Any) -> Any:
    """GPT-2, whose norms and logits stay in float64; each time with the same weights."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 32, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(sizes | options))).double()


def other_model(size: float = 0.05, **options: Any) -> Any:
    model = student(**options).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn_like(p))
    return model


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(count):
        ids = torch.randint(0, 32, (2, 9), generator=generator)
        labels = ids.clone()
        labels[0, :4], labels[1, :2] = -100, -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def config(start: str = "lora_one", **settings: Any) -> LoraConfig:
    values = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS, "init_seed": 0, "init_lora_weights": start}
    return LoraConfig(**(values | settings))


def joint_by_hand(teacher: nn.Module, weight: float) -> Any:
    """The joint loss over all logits, as a formula."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        counted = batch["labels"][:, 1:] != -100
        gold = batch["labels"][:, 1:][counted]
        own = model(input_ids=batch["input_ids"]).logits[:, :-1][counted]
        with torch.no_grad():
            theirs = teacher(input_ids=batch["input_ids"]).logits[:, :-1][counted].log_softmax(-1)
        divergence = (theirs.exp() * (theirs - own.log_softmax(-1))).sum(-1).mean()
        return nn.functional.cross_entropy(own, gold) + weight * divergence

    return loss


def assert_same(found: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    assert list(found) == list(wanted)
    for layer in wanted:
        assert found[layer].keys() == wanted[layer].keys()
        for name in wanted[layer]:
            if name.endswith((".U", ".Vh")):  # singular vectors of small values turn with rounding
                continue
            size = wanted[layer][name.replace("error2", "norm2")].abs().max()  # an error of zero is one of rounding
            scale = size.clamp(min=1e-12)
            close(found[layer][name] / scale, wanted[layer][name] / scale, tolerance)
        for kind in ("gradient", "whitened_gradient"):
            if f"{kind}.S" in wanted[layer]:
                both = [gradient_triplets(one[layer], kind).product() for one in (found, wanted)]
                close(*both, 1e-8)


_SLOW = [pytest.param(weight, marks=pytest.mark.slow) for weight in (0.0, 20.0)]


@pytest.mark.parametrize("weight", [0.7, *_SLOW])
@pytest.mark.parametrize(
    ("start", "how"),
    [
        ("lora_one", {"dense": False}), ("lora_one", {"dense": True}), ("functional", {"dense": False}),
        ("lora_one", {"dense": False, "halves": True}), ("gora", {}), ("lora_one", {"weighting": "tokens"}),
        ("functional", {"dense": False, "also": ["gradient"]}),
    ],
)  # fmt: skip
def test_two_sketches_added_up_are_the_sketch_of_the_joint_loss(start: str, how: dict[str, Any], weight: float) -> None:
    model, teacher = student(), other_model()
    asked = JointStart(teacher=teacher, divergence="fkl")
    joint = collect_joint_statistics(model, config(start), batches(), asked, **how)
    wanted = collect_statistics(model, config(start), batches(), loss=joint_by_hand(teacher, weight), **how)
    assert_same(joint.at(weight), wanted)


def test_lora_da_takes_the_joint_gradient_in_the_metrics_of_the_task() -> None:
    """Its second moment of output gradients is no sum of two: it stays that of the task's loss."""
    model, teacher = student(), other_model()
    joint = collect_joint_statistics(model, config("lora_da"), batches(), JointStart(teacher=teacher, divergence="fkl"))
    task = collect_statistics(model, config("lora_da"), batches())
    whole = collect_statistics(model, config("lora_da"), batches(), loss=joint_by_hand(teacher, 3.0))
    for layer, found in joint.at(3.0).items():
        close(found["gradient.dense"], whole[layer]["gradient.dense"], 1e-9)
        close(found["output_moment.Y"], task[layer]["output_moment.Y"], 1e-12)
        close(found["second_moment.C"], whole[layer]["second_moment.C"], 1e-12)


def test_the_data_is_gone_over_once_for_each_loss_whatever_the_weights_are() -> None:
    model, seen = student(), []

    class Counted(list[Any]):
        def __iter__(self) -> Any:
            seen.append(1)
            return super().__iter__()

    joint = collect_joint_statistics(model, config(), Counted(batches()), JointStart(teacher=other_model()))
    for weight in (0.1, 1.0, 5.0):
        joint.at(weight)
    assert len(seen) == 2


def test_the_default_weight_makes_the_teachers_gradient_half_of_the_tasks() -> None:
    model, teacher = student(), other_model()
    joint = collect_joint_statistics(model, config(), batches(), JointStart(teacher=teacher), dense=True)
    norms = [[float(one[layer]["gradient.dense"].norm()) for layer in joint.task] for one in (joint.task, joint.align)]
    stats = joint.at()
    assert stats.about["joint"]["weight"] == pytest.approx(balanced_weight(*norms), rel=1e-9)
    assert stats.about["joint"] == {
        "teacher": "external", "weight": stats.about["joint"]["weight"], "balanced": True,
    }  # fmt: skip
    assert_same(stats, joint.at(stats.about["joint"]["weight"]))


@pytest.mark.parametrize("start", ["lora_one", "functional"])
def test_the_start_is_that_of_the_joint_gradient(start: str) -> None:
    model, teacher = student(), other_model()
    loss = joint_by_hand(teacher, 2.0)
    wanted = initialize(copy.deepcopy(model), config(start), batches(), loss=loss)
    found = initialize(model, config(start), batches(), align=JointStart(teacher=teacher, divergence="fkl", weight=2.0))
    for (path, one), (_, other) in zip(
        found.base_model.lora_layers(), wanted.base_model.lora_layers(), strict=True
    ):
        close(one.get_delta_weight("default"), other.get_delta_weight("default"), 1e-8)
        assert float(one.get_delta_weight("default").norm()) > 0, path


def test_ranks_go_by_the_joint_gradient() -> None:
    model, teacher, rule = student(), other_model(), RankRule("budget")
    how = {"ranks": rule, "halves": True, "dense": True}
    wanted = initialize(copy.deepcopy(model), config(True), batches(), loss=joint_by_hand(teacher, 5.0), **how)  # type: ignore[arg-type]
    asked = JointStart(teacher=teacher, divergence="fkl", weight=5.0)
    found = initialize(copy.deepcopy(model), config(True), batches(), align=asked, **how)  # type: ignore[arg-type]
    plain = initialize(model, config(True), batches(), **how)  # type: ignore[arg-type]
    ranks = [[layer.r["default"] for _, layer in one.base_model.lora_layers()] for one in (found, wanted, plain)]
    assert ranks[0] == ranks[1] != ranks[2]


@pytest.mark.filterwarnings("ignore:stable_gamma='auto'")
def test_gamma_is_chosen_by_the_joint_objective() -> None:
    model, teacher, held = student(), other_model(), batches(6)[4:]
    own = {"init_config": {"stable_gamma": "auto"}}
    loss = joint_by_hand(teacher, 20.0)
    wanted = initialize(copy.deepcopy(model), config(**own), batches(), loss=loss, heldout=held)
    asked = JointStart(teacher=teacher, divergence="fkl", weight=20.0)
    found = initialize(model, config(**own), batches(), align=asked, heldout=held)
    gammas = [one.peft_config["default"].init_config.stable_gamma for one in (found, wanted)]
    assert gammas[0] == gammas[1]


@pytest.mark.parametrize("teacher", ["base", "ema", "anchor", Snapshot()], ids=["base", "ema", "anchor", "made"])
def test_a_teacher_that_is_the_start_leaves_the_task_alone_and_says_so(teacher: Any) -> None:
    model = student()
    plain = collect_statistics(model, config(), batches())
    joint = collect_joint_statistics(model, config(), batches(), JointStart(teacher=teacher))
    assert joint.align is None
    for stats in (joint.at(), joint.at(3.0)):
        assert_same(stats, plain, 0.0)
        assert stats.about["joint"]["weight"] is None
        assert "is the model itself where it starts" in stats.about["joint"]["why"]
    with pytest.warns(UserWarning, match="The start is the task's alone: the teacher '.*' is the model itself"):
        initialize(model, config(), batches(), align=JointStart(teacher=teacher))


def test_another_model_of_the_same_weights_has_nothing_to_say_either() -> None:
    model = student()
    stats = collect_joint_statistics(model, config(), batches(), JointStart(teacher=student())).at()
    assert stats.about["joint"]["weight"] is None
    assert "less than a thousandth of the task's" in stats.about["joint"]["why"]
    assert_same(stats, collect_statistics(model, config(), batches()), 1e-12)


def test_an_alignment_is_taken_with_its_divergence_and_map() -> None:
    model, teacher = student(), other_model()
    alignment = Alignment(model, teacher, divergence="rkl", map="mse", map_weight=0.3)
    joint = collect_joint_statistics(model, config(), batches(), alignment, dense=True)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return supervised_loss(model, batch) + 2.0 * alignment.discrepancy(model, batch)

    assert_same(joint.at(2.0), collect_statistics(model, config(), batches(), loss=loss, dense=True))


def test_a_map_alone_can_be_what_is_compared() -> None:
    asked = JointStart(teacher=other_model(n_embd=24), divergence="none", map="gram")
    stats = collect_joint_statistics(student(), config(), batches(), asked).at()
    assert stats.about["joint"]["weight"] > 0


def test_what_two_losses_do_not_go_with_is_refused_and_changes_nothing() -> None:
    model, teacher = student(), other_model()
    before, asked = everything(model), JointStart(teacher=teacher)

    def given(data: Any = None, start: Any = "lora_one", align: Any = asked, **how: Any) -> Any:
        return lambda: collect_joint_statistics(model, config(start), data or batches(), align, **how)

    refused_with = {
        "align= would change nothing: init_lora_weights='pissa' reads no gradient": given(start="pissa"),
        "passes=2 follows the range of one gradient": given(passes=2),
        "A function as data runs over the task's loss by itself": given(data=lambda: None),
        "cache= keeps the statistics of one loss": given(cache="file.safetensors"),
        "align= takes an Alignment or a JointStart": given(align="base"),
        "weight must be a number >= 0": lambda: JointStart(teacher=teacher, weight=-1.0),
        "rho must be a number above 0": lambda: JointStart(teacher=teacher, rho=0.0),
        "The teacher has 48 tokens and the student 32": given(align=JointStart(teacher=other_model(vocab_size=48))),
        "The teacher and the model share layers": given(align=JointStart(teacher=nn.Sequential(model.transformer))),
        "teacher='external' names no model": given(align=JointStart(teacher="external")),
    }
    for text, call in refused_with.items():
        with pytest.raises(ConfigError, match=text.replace("(", r"\(")):
            call()
    with pytest.raises(CalibrationError, match="must be a mapping of the model's arguments with labels, found Tensor"):
        given(data=[torch.zeros(2, 9, dtype=torch.long)], loss=lambda m, x: m(x).logits.mean())()
    assert_unchanged(before, model)


def test_a_teacher_that_gives_nan_is_refused() -> None:
    model, teacher = student(), other_model()
    with torch.no_grad():
        teacher.lm_head.weight.fill_(torch.nan)
    before = everything(model)
    with pytest.raises(DivergedError, match=r"The divergence from the teacher is not finite\. Look at"):
        initialize(model, config(), batches(), align=JointStart(teacher=teacher))
    assert_unchanged(before, model)


def test_half_samples_that_mix_between_the_two_losses_are_refused() -> None:
    class Turning(list[Any]):
        turn = 0

        def __iter__(self) -> Any:
            self.turn += 1
            return iter(sorted(self[:], key=lambda batch: self.turn * int(batch["input_ids"].sum()) % 101))

    data = Turning(batches())
    how = {"halves": True, "dense": True}
    with pytest.raises(CalibrationError, match="came in another order, or were others, for the teacher than for"):
        collect_joint_statistics(student(), config(), data, JointStart(teacher=other_model()), **how)  # type: ignore[arg-type]


def test_a_layer_whose_joint_gradient_is_not_finite_starts_as_by_default() -> None:
    model = student()
    joint = collect_joint_statistics(model, config(), batches(), JointStart(teacher=other_model()), dense=False)
    assert joint.align is not None
    first = next(iter(joint.task))
    joint.align.values_by_layer[first]["gradient.sums.0.Y"].fill_(torch.nan)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        started = lorafa.start_from(model, config(), joint.at(1.0))
    assert any("its gradient is not finite" in str(one.message) for one in said)
    layers = dict(started.base_model.lora_layers())
    assert [name for name, layer in layers.items() if layer.fallbacks] == [first]


def test_a_model_with_adapters_is_read_without_them() -> None:
    teacher, model = other_model(), adapted(student(), target_modules=TARGETS)
    found = collect_joint_statistics(model, config(), batches(), JointStart(teacher=teacher), dense=True)
    wanted = collect_joint_statistics(student(), config(), batches(), JointStart(teacher=teacher), dense=True)
    assert_same(found.at(1.5), wanted.at(1.5))
