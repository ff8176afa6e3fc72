"""`lorafa train`: starts from a teacher, and starts of the joint objective of task and teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from lorafa.alignment.balance import balanced_weight
from lorafa.cli.main import main
from lorafa.train import teacher as teachers
from toys.workplace import make_workplace, read, settings

SHORT = ["eval.size=0", "eval.before=false", "train.steps=1", "train.checkpoint_every=0", "optim.lr=1e-12"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("work"))
    shutil.copytree(folder / "model", folder / "teacher")
    model = LlamaForCausalLM.from_pretrained(folder / "teacher")
    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "v_proj" in name:
                p.add_(0.1 * torch.randn(len(p), 2) @ torch.randn(2, p.shape[1]))
    model.save_pretrained(folder / "teacher")
    return folder


def command(workplace: Path, run: Path, *own: str) -> list[str]:
    return ["train", *settings(workplace, run), *SHORT, "peft.target_modules=[q_proj,v_proj]", *own]


def started(workplace: Path, run: Path, *own: str) -> dict[str, Any]:
    assert main(command(workplace, run, *own)) == 0
    found: dict[str, Any] = read(run / "result.json")["start"]
    return found


def updates(run: Path) -> dict[str, torch.Tensor]:
    """s B A of the adapter of a run, layer by layer, for r=4."""
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    config = read(run / "adapter" / "adapter_config.json")
    found = {}
    for name, A in tensors.items():
        if "lora_A" in name:
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[layer] = config["lora_alpha"] / config["r"] * tensors[name.replace("lora_A", "lora_B")] @ A
    return found


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out = capsys.readouterr()
    return " ".join((out.out + out.err).split())


def test_a_run_starts_as_the_copy_of_its_teacher(workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    started(workplace, run, "init=from_teacher", "init.iters=4", f"init.teacher={workplace / 'teacher'}")
    own, theirs = (load_file(workplace / name / "model.safetensors") for name in ("model", "teacher"))
    for layer, update in updates(run).items():
        change = theirs[f"{layer}.weight"] - own[f"{layer}.weight"]
        assert float(change.norm()) > 0
        torch.testing.assert_close(update, change, rtol=1e-3, atol=1e-3 * float(change.abs().max()))


@pytest.mark.slow
def test_lora_da_reads_the_rows_of_its_gradient_or_all_that_are_trained_on(workplace: Path, tmp_path: Path) -> None:
    for samples, rows in (("sample", 6), ("train", 16), ("7", 7)):
        own = ["init=lora_da", "init.iters=3", "init.bsz=2", f"init.samples={samples}"]
        start = started(workplace, tmp_path / samples, *own)
        assert (start["rows"], start["samples"], start["fallbacks"]) == (6, rows, {})
    assert updates(tmp_path / "sample").keys() == updates(tmp_path / "train").keys()
    one, other = (updates(tmp_path / samples) for samples in ("sample", "train"))
    assert any(not torch.allclose(one[layer], other[layer], rtol=1e-3, atol=1e-9) for layer in one)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["lora_one", "functional"])
def test_the_start_of_a_run_with_a_teacher_is_that_of_both(workplace: Path, tmp_path: Path, start: str) -> None:
    teacher = ["align=external", f"align.teacher={workplace / 'teacher'}"]
    init = [f"init.mode={start}", "init.iters=4", "init.stable_gamma=4"]
    found = {}
    for name, own in {
        "joint": teacher, "none": [*teacher, "align.start_weight=0"], "apart": [*teacher, "align.start=false"],
        "plain": [],
    }.items():  # fmt: skip
        record = started(workplace, tmp_path / name, *init, *own)
        found[name] = record.get("joint"), updates(tmp_path / name)
    joint, none = found["joint"][0], found["none"][0]
    assert joint["teacher"] == "external"
    assert joint["balanced"]
    assert joint["weight"] > 0
    assert none == {"teacher": "external", "weight": 0.0, "balanced": False}
    assert found["apart"][0] is found["plain"][0] is None
    for layer, update in found["plain"][1].items():
        for name in ("none", "apart"):
            torch.testing.assert_close(found[name][1][layer], update, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found["joint"][1][layer], update, rtol=0.05, atol=1e-4)
    page = (tmp_path / "joint" / "report.html").read_text(encoding="utf-8")
    assert f"{joint['weight']:.3g}, which balances the gradients" in page


@pytest.mark.slow
def test_a_teacher_is_loaded_once_for_start_and_training(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, own = [], teachers.load_model

    def noted(name: str, *args: Any) -> Any:
        loaded.append(name)
        return own(name, *args)

    monkeypatch.setattr(teachers, "load_model", noted)
    teacher = ["align=external", f"align.teacher={workplace / 'teacher'}"]
    started(workplace, tmp_path / "joint", "init.mode=lora_one", "init.iters=2", *teacher)
    assert len(loaded) == 1
    assert main(command(workplace, tmp_path / "plain", *teacher)) == 0
    assert len(loaded) == 2


@pytest.mark.slow
def test_a_teacher_that_is_the_start_is_said_to_be_and_changes_nothing(workplace: Path, tmp_path: Path) -> None:
    init = ["init.mode=lora_one", "init.iters=2"]
    record = started(workplace, tmp_path / "base", *init, "align=base")
    assert record["joint"] == {
        "teacher": "base", "weight": None, "balanced": False,
        "why": "the teacher 'base' is the model itself where it starts, so its gradient is zero there",
    }  # fmt: skip
    started(workplace, tmp_path / "plain", *init)
    for layer, update in updates(tmp_path / "plain").items():
        torch.testing.assert_close(updates(tmp_path / "base")[layer], update, rtol=1e-5, atol=1e-7)
    page = (tmp_path / "base" / "report.html").read_text(encoding="utf-8")
    assert "none: the teacher &#39;base&#39; is the model itself where it starts" in page


@pytest.mark.slow
def test_ranks_and_gamma_of_a_run_go_by_both(workplace: Path, tmp_path: Path) -> None:
    teacher = ["align=external", f"align.teacher={workplace / 'teacher'}"]
    init = ["init.mode=lora_one", "init.iters=4", "init.ranks=budget", "init.stable_gamma=auto"]
    record = started(workplace, tmp_path / "run", *init, *teacher)
    assert record["joint"]["weight"] > 0
    assert record["stable_gamma"] in (64, 128, 256, 512, 1024, 2048)
    assert balanced_weight([1.0], [1.0]) == 0.5  # the rule whose weight is recorded


def test_what_a_start_with_a_teacher_does_not_go_with_is_refused(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_workplace(tmp_path, hidden_size=48)
    wide, teacher = tmp_path / "model", ["align=external", f"align.teacher={workplace / 'teacher'}"]
    few = ["init=from_teacher", "init.iters=2"]
    for own, text in (
        (["init=from_teacher"], "A start from a teacher needs one"),
        ([*few, f"init.teacher={wide}"], "are of other shapes. A start from a teacher copies layers of equal shapes"),
        ([*few, f"init.teacher={workplace / 'model'}x"], "No model"),
        (["align.start=false"], "align.start=False would change nothing: there is no teacher"),
        (["align.start_weight=1"], "align.start_weight=1.0 would change nothing: there is no teacher"),
        (["align=base", "align.start=false", "align.start_weight=1"], "align.start_weight=1.0 would change nothing"),
        ([*teacher, "align.start_weight=-1"], "align.start_weight must be a number >= 0"),
        ([*teacher, "init.mode=lora_one", "init.passes=2"], "passes=2 follows the range of one gradient"),
        (["init.teacher=x"], "It belongs to init=from_teacher"),
    ):
        assert main(command(workplace, tmp_path / "run", *own)) != 0, own
        assert text in said(capsys), own
