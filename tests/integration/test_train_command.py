"""`lorafa train` from the command line to the files, on a model of a few thousand parameters and twenty rows."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorafa import PeftModel
from lorafa.cli.main import main
from lorafa.train import measuring, recipe, trainer
from toys.workplace import STEPS, make_workplace, metrics, read, settings


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def finished(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", *settings(workplace, path)]) == 0
    return path


def test_a_run_directory_holds_what_it_promises(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "result.json", "adapter", "report.html"} <= names
    assert {path.name for path in (finished / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_result_has_the_scores_and_the_price(finished: Path) -> None:
    result = read(finished / "result.json")
    assert result["status"] == "finished"
    assert result["steps"] == STEPS
    assert result["after"]["loss"] < result["before"]["loss"]
    for scores in (result["before"], result["after"]):
        assert scores["total"] == 4
        assert 0 <= scores["accuracy"] <= 1
    assert 0 < result["parameters"]["trainable"] < result["parameters"]["all"]
    assert result["peak_rss_bytes"] > 0
    assert {"prepare", "evaluate before", "train", "evaluate after", "total"} <= result["seconds"].keys()
    assert [sample["gold"] for sample in result["samples"]]


def test_every_step_is_in_the_metrics_with_all_its_columns(finished: Path) -> None:
    rows = metrics(finished)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all({"loss", "lr", "grad_norm", "tokens", "seconds", "epoch"} <= row.keys() for row in rows)
    assert [row["tokens"] for row in rows] == sorted(row["tokens"] for row in rows)


def test_the_report_has_the_curve_and_the_settings(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "<svg" in page
    assert "lora_dropout: 0.1" in page


def test_the_saved_adapter_gives_the_loss_the_run_reported(
    finished: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from lorafa.runs.record import RunDirectory

    config = RunDirectory.open(finished).config()
    prepared = recipe.prepare(config, Console(quiet=True))
    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    loaded = PeftModel.from_pretrained(base, str(finished / "adapter"))
    loss = measuring.answer_loss(loaded, prepared.data.heldout.samples, prepared.collator, 4)
    assert loss == pytest.approx(read(finished / "result.json")["after"]["loss"], rel=1e-5)


def test_a_run_is_not_overwritten(finished: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read(finished / "result.json")
    assert main(["train", *settings(workplace, finished)]) == 2
    assert "exists and is not empty; a run overwrites nothing" in " ".join(capsys.readouterr().err.split())
    assert read(finished / "result.json") == before


def test_a_finished_run_is_not_continued(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"train.resume={finished}"]) == 2
    assert "is finished; there is nothing to continue" in " ".join(capsys.readouterr().err.split())


def test_a_run_cut_short_and_continued_ends_as_one_that_was_not(
    finished: Path, workplace: Path, tmp_path: Path, stop_after: Callable[[int], None]
) -> None:
    run = tmp_path / "cut"
    stop_after(6)
    assert main(["train", *settings(workplace, run)]) == 130
    left = read(run / "result.json")
    assert left["status"] == "failed"
    assert left["before"] == {**left["before"], "loss": read(finished / "result.json")["before"]["loss"]}
    assert not (run / "adapter").exists()

    stop_after(10**6)
    assert main(["train", f"train.resume={run}"]) == 0
    assert [row["step"] for row in metrics(run)] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(finished)]
    assert read(run / "result.json")["after"] == read(finished / "result.json")["after"]
    whole, parts = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (finished, run))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Interrupt the training, as Ctrl-C does, when it has logged more steps than given."""
    original = recipe.RunCallback.on_log

    def install(steps: int) -> None:
        def on_log(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            original(self, args, state, control, logs, **rest)
            if state.global_step >= steps:
                raise KeyboardInterrupt

        monkeypatch.setattr(recipe.RunCallback, "on_log", on_log)

    return install


def test_a_run_without_checkpoints_cannot_be_continued(
    workplace: Path, tmp_path: Path, stop_after: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(2)
    run = tmp_path / "cut"
    assert main(["train", *settings(workplace, run), "train.checkpoint_every=0", "eval.size=0"]) == 130
    assert main(["train", f"train.resume={run}"]) == 1
    assert "has no checkpoint to continue from (train.checkpoint_every is 0)" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_dry_run_shows_settings_coverage_and_a_sample_and_writes_nothing(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *settings(workplace, tmp_path / "run"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert '"lora_dropout": 0.1' in out
    assert re.search(r"q_proj .* Linear .* 2/2", out)
    assert re.search(r"lm_head .* 0/1", out)
    assert "Ann has" in out
    assert "tokens are trained" in out


def test_a_template_by_name_or_from_a_file_is_what_samples_and_questions_are_written_with(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<|end|>{{ m.content }}{% endfor %}")
    for template, shown in (("plain", "\u2502 Ann has"), (str(tmp_path / "own.jinja"), "\u2502 <|end|>Ann has")):
        arguments = [*settings(workplace, tmp_path / "run"), f"data.template={template}", "--dry-run"]
        assert main(["train", *arguments]) == 0
        assert shown in capsys.readouterr().out
    assert main(["train", *settings(workplace, tmp_path / "run"), "data.template=vicunna", "--dry-run"]) == 2
    assert "Did you mean 'vicuna'?" in " ".join(capsys.readouterr().err.split())


def test_answers_are_over_at_the_ends_that_were_trained(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(model: Any, tokenizer: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        asked.append(tokenizer.convert_ids_to_tokens(sorted(options["ends"])))
        return [[] for _ in prompts]

    monkeypatch.setattr("lorafa.evals.gsm8k.generate_ids", answer)
    template = tmp_path / "own.jinja"
    ends = "<|{{ 'user' if m.role == 'assistant' else 'assistant' }}|>"
    template.write_text(f"{{% for m in messages %}}{{{{ m.content }}}}{ends}{{% endfor %}}")
    assert main(["train", *settings(workplace, tmp_path / "run"), f"data.template={template}", "train.steps=1"]) == 0
    assert asked == [["<|user|>"]] * 2


def test_the_best_checkpoint_is_the_one_that_is_kept(workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "best"
    extra = ["train.keep_best=true", "eval.size=0", "optim.lr=0.3", "optim.schedule=constant"]
    assert main(["train", *settings(workplace, run), *extra]) == 0
    measured = [row["eval_loss"] for row in metrics(run) if "eval_loss" in row]
    assert len(measured) == STEPS // 4
    result = read(run / "result.json")
    assert (result["kept_step"], result["kept_by_rows"]) == (4 * (1 + measured.index(min(measured))), 4)
    assert read(run / "result.json")["after"]["loss"] == pytest.approx(min(measured), rel=1e-4)


def test_a_run_that_keeps_its_last_step_names_none(finished: Path) -> None:
    assert "kept_step" not in read(finished / "result.json")


def test_the_number_of_threads_is_that_of_the_settings_and_is_given_back(workplace: Path, tmp_path: Path) -> None:
    run, before = tmp_path / "run", torch.get_num_threads()
    short = ["eval.size=0", "eval.before=false", "train.steps=1", "train.checkpoint_every=0"]
    assert main(["train", *settings(workplace, run), *short, f"threads={before + 1}"]) == 0
    assert read(run / "environment.json")["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.matrix(3, each_word=False)
@pytest.mark.parametrize(
    "method",
    [
        ["peft=dora"],
        ["peft=rslora", "init=pissa"],
        ["+init=gradient", "++init.direction=LoRA-FA", "++init.iters=2", "init.stable_gamma=auto"],
        ["init=lora_ga", "init.iters=2", "peft.r=2"],
        ["init=eva", "init.iters=2"],
        ["+init=svd"],
        ["+init=kaiming"],
        ["+init=gaussian"],
        ["+init=corda", "init.iters=2"],
        ["+init=olora"],
        ["+init=loftq"],
        ["init=functional", "init.iters=2", "init.passes=4", "init.ranks=budget", "peft.r=2"],
        ["init=default", "init.iters=2", "init.ranks=budget", "peft.r=2"],
        ["peft=qv", "init=gaussian", "train.chunked_loss=false"],
        ["optim=sgd", "train.gradient_checkpointing=true"],
        ["optim=adafactor", "train.accumulation=2", "train.group_by_length=false"],
    ],
    ids=lambda method: " ".join(method),
)
def test_every_kind_of_setting_trains(workplace: Path, tmp_path: Path, method: list[str]) -> None:
    run = tmp_path / "run"
    short = ["eval.size=0", "train.steps=2", "train.checkpoint_every=0"]
    assert main(["train", *settings(workplace, run), *method, *short]) == 0
    result = read(run / "result.json")
    assert result["status"] == "finished"
    assert math.isfinite(result["after"]["loss"])
    assert result["after"]["loss"] != result["before"]["loss"]
    assert len(metrics(run)) == 2


@pytest.mark.parametrize(
    ("setting", "status", "message"),
    [
        ("peft.target_modules=[q_prj]", 2, "q_prj"),
        ("data.max_length=3", 1, "None of the 16 samples has a trained token"),
        ("data.prompt_column=question", 2, "Give both data.prompt_column and data.completion_column"),
        ("data.eval_size=40", 1, "Lower data.eval_size or data.train_size"),
        ("init.mode=pisa", 2, "pisa"),
    ],
)
def test_what_does_not_fit_leaves_no_run_directory(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, status: int, message: str
) -> None:
    run = tmp_path / "run"
    assert main(["train", *settings(workplace, run), setting]) == status
    assert message in capsys.readouterr().err
    assert not run.exists()


def test_the_heldout_loss_is_measured_on_the_way_and_the_loss_is_tried_once_a_run(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[object] = []
    for module in (recipe, trainer):
        trial = module.supports_chunked_loss
        monkeypatch.setattr(module, "supports_chunked_loss", lambda model, own=trial: tried.append(model) or own(model))
    own = [text for text in settings(workplace, tmp_path / "run") if "checkpoint" not in text]
    more = ["train.eval_every=5", "train.eval_size=2", "optim=lora_fa", "optim.algorithm=fold", "eval.size=0"]
    assert main(["train", *own, *more]) == 0
    assert [row["step"] for row in metrics(tmp_path / "run") if "eval_loss" in row][:2] == [5, 10]
    assert len(tried) == 1


def test_what_lora_fa_freezes_is_not_counted_as_trained(workplace: Path, tmp_path: Path) -> None:
    counted = {}
    for optim in ("adamw", "lora_fa"):
        assert main(["train", *settings(workplace, tmp_path / optim), f"optim={optim}", "eval.size=0"]) == 0
        result = read(tmp_path / optim / "result.json")["parameters"]
        assert result["trainable"] < result["all"]
        counted[optim] = result["trainable"]
    tensors = load_file(tmp_path / "lora_fa" / "adapter" / "adapter_model.safetensors")
    assert counted["adamw"] == sum(tensor.numel() for tensor in tensors.values())
    assert counted["lora_fa"] == sum(tensor.numel() for key, tensor in tensors.items() if "lora_B" in key)


def test_one_step_trains_and_the_last_steps_are_logged_whatever_log_every_is(workplace: Path, tmp_path: Path) -> None:
    short = ["eval.size=0", "train.checkpoint_every=0", "optim.warmup=0.05"]
    assert main(["train", *settings(workplace, tmp_path / "one"), *short, "train.steps=1"]) == 0
    result = read(tmp_path / "one" / "result.json")
    assert result["after"]["loss"] < result["before"]["loss"]
    assert [row["lr"] for row in metrics(tmp_path / "one")] == [1e-2]
    assert main(["train", *settings(workplace, tmp_path / "seven"), *short, "train.steps=7", "train.log_every=3"]) == 0
    assert [row["step"] for row in metrics(tmp_path / "seven")] == [1, 3, 6, 7]


def test_a_warm_up_longer_than_the_passes_is_refused(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passes = ["train.steps=null", "train.epochs=2", "optim.warmup=8"]
    assert main(["train", *settings(workplace, tmp_path / "run"), *passes]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "optim.warmup=8 steps are the whole training (train.epochs=2, 8 steps), so optim.lr would never be" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.matrix(3, each_word=False)
@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy", "warmup_stable_decay"])
def test_every_kind_of_schedule_trains_and_is_continued(
    workplace: Path, tmp_path: Path, stop_after: Callable[[int], None], schedule: str
) -> None:
    short = ["eval.size=0", "train.steps=8", "train.eval_every=1", f"optim.schedule={schedule}"]
    measured = ["optim.patience=0", "optim.factor=0.5", "optim.threshold=0.1"]
    short += ["optim.num_decay_steps=0.5"] if schedule == "warmup_stable_decay" else measured
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", *settings(workplace, whole), *short]) == 0
    stop_after(6)
    assert main(["train", *settings(workplace, cut), *short]) == 130
    stop_after(10**6)
    assert main(["train", f"train.resume={cut}"]) == 0
    rates = [row["lr"] for row in metrics(whole) if "lr" in row]
    assert len(set(rates)) > 1
    assert [row["lr"] for row in metrics(cut) if "lr" in row] == rates
    assert read(cut / "result.json")["after"]["loss"] == read(whole / "result.json")["after"]["loss"]
