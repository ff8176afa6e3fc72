"""`lorafa train objective=...`, from the command line to the files, on a model of a few thousand parameters."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lorafa import PeftModel
from lorafa.cli.main import main
from lorafa.runs.record import RunDirectory
from lorafa.train.fit import in_steps, training_settings
from lorafa.train.records import find_records
from toys.kinds import make_t5
from toys.objectives import needs_trl
from toys.workplace import ROWS, at_step, make_workplace, metrics, read

pytestmark = [needs_trl, pytest.mark.slow]  # TRL takes seconds to import

LOG_2 = pytest.approx(math.log(2), rel=1e-6)
REWARD = "def variety(prompts, completions, **_):\n    return [float(len(set(c[0]['content']))) for c in completions]\n"
OBJECTIVES = {
    "dpo": ["data={}/pairs.jsonl"],
    "orpo": ["data={}/pairs.jsonl"],
    "kto": ["data={}/judged.jsonl"],
    "reward": ["data={}/pairs.jsonl"],
    "grpo": [
        "data={}/prompts.jsonl", "objective.reward=rewards_of_a_test:variety", "objective.num_generations=2",
        "objective.max_completion_length=6", "objective.beta=0.1",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("work"))
    asked = [{"prompt": row["question"], "chosen": row["answer"], "rejected": row["answer"] + "0"} for row in ROWS]
    judged = [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "label": bool(n % 2)}
        for n, row in enumerate(asked)
    ]
    prompts = [{"prompt": row["prompt"]} for row in asked]
    for name, rows in {"pairs": asked, "judged": judged, "prompts": prompts}.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rewards_of_a_test.py").write_text(REWARD)
    return folder


def settings(workplace: Path, run: Path, objective: str, *more: str) -> list[str]:
    return [
        f"model={workplace / 'model'}", f"objective={objective}", f"run_dir={run}", "data.eval_size=4", "peft.r=4",
        "optim.lr=1e-2", "train.epochs=2", "train.batch_size=4", "train.checkpoint_every=3", "eval=loss",
        *(text.format(workplace) for text in OBJECTIVES[objective]), *more,
    ]  # fmt: skip


def numbers(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in metrics(run)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_that_is_resumed_in_its_second_pass_is_the_unbroken_one(
    objective: str, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", *settings(workplace, whole, objective)]) == 0
    steps = read(whole / "result.json")["steps"]
    with monkeypatch.context() as patch:
        at_step(patch, steps // 2 + 2)
        assert main(["train", *settings(workplace, cut, objective)]) == 130
    named = [text for text in OBJECTIVES[objective] if text.startswith("objective.reward=")]  # code is named again
    assert main(["train", f"train.resume={cut}", *([f"objective={objective}"] if named else []), *named]) == 0
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, cut))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert numbers(whole) == numbers(cut)
    assert read(whole / "result.json")["after"] == read(cut / "result.json")["after"]


def test_a_run_of_dpo_has_all_that_a_run_has(workplace: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert main(["train", *settings(workplace, run, "dpo", "train.eval_every=4")]) == 0
    rows, result = metrics(run), read(run / "result.json")
    measured, rows = ([row for row in rows if key in row] for key in ("eval_loss", "loss"))
    assert rows[0]["loss"] == LOG_2
    assert all(row["tokens"] > 0 for row in rows)
    assert {"reward_accuracy", "reward_margin", "loss", "lr", "grad_norm", "tokens", "seconds"} <= rows[0].keys()
    assert [row["step"] for row in measured] == [4, 8]
    assert {"eval_reward_accuracy", "eval_reward_margin"} <= measured[0].keys()
    assert rows[-1]["loss"] < rows[0]["loss"]
    for when in ("before", "after"):
        assert {"loss", "preference_accuracy", "preference_margin"} <= result[when].keys()
    assert result["after"]["preference_margin"] > result["before"]["preference_margin"]
    assert "preference_accuracy" in (run / "report.html").read_text()
    assert "16 samples to train on, 4 held out." in " ".join(capsys.readouterr().out.split())
    newest = sorted((run / "checkpoints").iterdir())[-1]
    names = {path.name for path in newest.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "reference.safetensors", "optimizer.pt"} <= names
    assert "model.safetensors" not in names
    config = read(run / "adapter" / "adapter_config.json")
    assert (config["task_type"], config["lora_dropout"]) == ("CAUSAL_LM", 0.0)


def test_the_reference_of_an_adapter_that_is_trained_on_is_that_adapter(workplace: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", *settings(workplace, first, "dpo")]) == 0
    own = [text for text in settings(workplace, second, "dpo") if not text.startswith("peft.")]
    assert main(["train", *own, f"peft.adapter={first / 'adapter'}"]) == 0
    row = metrics(second)[0]
    assert row["loss"] == LOG_2
    assert row["reward_margin"] == 0.0
    kept = load_file(sorted((second / "checkpoints").iterdir())[-1] / "reference.safetensors")
    began = load_file(first / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".default.", "."): value for name, value in kept.items()}.keys() == began.keys()
    for name, value in kept.items():
        assert torch.equal(value, began[name.replace(".default.", ".")])


def test_a_start_that_moves_the_base_is_its_own_reference(workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *settings(workplace, run, "dpo", "init=pissa", "train.epochs=null", "train.steps=2")]) == 0
    assert metrics(run)[0]["loss"] == LOG_2


@pytest.mark.parametrize(("objective", "exactly"), [("kto", True), ("dpo", False)])
def test_the_losses_are_those_of_trl_by_hand(objective: str, exactly: bool, workplace: Path, tmp_path: Path) -> None:
    """The same rows as texts, through TRL's own tokenizing, with copies of the model as policy and as reference.

    KTO's batches are the same rows in the same places, so its losses agree to the last bit. DPO's are of all rows, each
    time in another order.
    """
    run, size = tmp_path / "run", 10 if objective == "kto" else len(ROWS)
    more = ("data.eval_size=0", "train.epochs=null", "train.steps=3", f"train.batch_size={size}", "optim.warmup=0")
    assert main(["train", *settings(workplace, run, objective, *more)]) == 0
    config = RunDirectory.open(run).config()
    told = training_settings(in_steps(config, len(ROWS)), tmp_path / "by-hand") | {
        "bf16": False, "gradient_checkpointing": False, "max_length": 512, "save_strategy": "no",
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    told = {name: value for name, value in told.items() if not name.startswith("save_") or name == "save_strategy"}
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(workplace / "model", dtype=torch.float32),
        run / "adapter",
        is_trainable=True,
    )
    began = load_file(sorted((run / "checkpoints").iterdir())[-1] / "reference.safetensors")
    with torch.no_grad():
        for name, value in began.items():
            model.get_parameter(name).copy_(value)
    import trl
    from datasets import Dataset

    name = objective.upper()
    trainer_class, config_class = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    trainer = trainer_class(
        copy.deepcopy(model).get_base_model(), ref_model=model.get_base_model(), args=config_class(**told),
        train_dataset=Dataset.from_list(in_order_of_the_run(config)),
        processing_class=AutoTokenizer.from_pretrained(workplace / "model"),
    )  # fmt: skip
    trainer.train()
    by_hand = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    losses = [row["loss"] for row in metrics(run)]
    assert len({*losses}) == 3
    assert losses == (by_hand if exactly else pytest.approx(by_hand, rel=1e-5))


def in_order_of_the_run(config: Any) -> list[dict[str, Any]]:
    """The rows a run has trained on, as TRL documents them, in the order of its selection."""
    selection = find_records(config.data, config.objective.entry.reading).selection
    found = dict(selection.training())
    rows = []
    for record in (found[number] for number in selection.order.tolist()):
        asked = [{"role": turn.role, "content": turn.content} for turn in record.question]
        answers = [[{"role": "assistant", "content": one.content}] for one in (record.messages[-1], *record.rejected)]
        names = ("chosen", "rejected") if record.rejected else ("completion",)
        rows.append({"prompt": asked, **dict(zip(names, answers, strict=True))})
        if record.desirable is not None:
            rows[-1]["label"] = record.desirable
    return rows


def test_a_reward_model_is_saved_with_its_head_and_scores_as_it_did(workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *settings(workplace, run, "reward", "train.epochs=6")]) == 0
    result = read(run / "result.json")
    assert result["after"]["preference_accuracy"] > 0.5
    assert result["after"]["preference_margin"] > result["before"]["preference_margin"]
    assert "loss" not in result["after"]
    config = read(run / "adapter" / "adapter_config.json")
    assert config["task_type"] == "SEQ_CLS"
    assert "score" in config["modules_to_save"]
    base = AutoModelForSequenceClassification.from_pretrained(
        workplace / "model", num_labels=1, dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(workplace / "model")
    base.config.pad_token_id = tokenizer.pad_token_id
    model = PeftModel.from_pretrained(base, run / "adapter").eval()
    scores = []
    for answer in (ROWS[0]["answer"], ROWS[0]["answer"] + "0"):
        turns = [{"role": "user", "content": ROWS[0]["question"]}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        with torch.no_grad():
            scores.append(model(input_ids=ids).logits.item())
    assert scores[0] > scores[1]


def test_grpo_learns_what_is_rewarded(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "rewards_of_short.py").write_text(
        "def short(completions, completion_ids, **_):\n    return [-float(len(ids)) for ids in completion_ids]\n"
    )
    monkeypatch.chdir(workplace)
    run = tmp_path / "run"
    more = ["objective.reward=rewards_of_short:short", "objective.num_generations=4", "train.batch_size=8"]
    assert main(["train", *settings(workplace, run, "grpo", *more, "train.epochs=8", "optim.lr=3e-2")]) == 0
    rewards = [row["reward"] for row in metrics(run)]
    assert sum(rewards[-4:]) > sum(rewards[:4])
    assert metrics(run)[0]["kl"] == 0.0  # the reference is the model at step 0
    assert all(row["tokens"] > 0 for row in metrics(run))


def test_activations_that_are_computed_again_change_nothing(workplace: Path, tmp_path: Path) -> None:
    losses = []
    for name in ("false", "true"):
        more = (f"train.gradient_checkpointing={name}", "train.epochs=null", "train.steps=3")
        assert main(["train", *settings(workplace, tmp_path / name, "dpo", *more)]) == 0
        losses.append([row["loss"] for row in metrics(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_reward_that_fails_on_the_way_is_in_the_record(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "rewards_that_fail.py").write_text("def late(completions, **_):\n    return [1.0] * 3\n")
    monkeypatch.chdir(workplace)
    run = tmp_path / "run"
    more = ("objective.reward=rewards_that_fail:late", "eval.before=false")
    assert main(["train", *settings(workplace, run, "grpo", *more)]) == 1
    text = "The reward rewards_that_fail:late returned 3 values for 4 answers. Return a list with a number for each."
    assert text in " ".join(capsys.readouterr().err.split())
    assert text in read(run / "result.json")["error"]


def test_what_cannot_be_trained_leaves_no_run_directory(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_t5(tmp_path)
    half = [{"prompt": "1?", "chosen": "1", "rejected": "2"}, {"prompt": "2?", "chosen": "2"}]
    (tmp_path / "half.jsonl").write_text("\n".join(map(json.dumps, half)))
    cases = {
        f"model={tmp_path / 'model'}": "trains models of the kind causal, and",
        f"data={tmp_path / 'half.jsonl'}": "half.jsonl, line 2: no 'rejected' answer, and a pair has two to compare.",
        "data=word_problems": "has one answer, and objective=dpo compares two: give rows with prompt, chosen and",
        "peft.target_modules=[q_proj,lm_head]": "multiplies by the weight of the output head itself",
    }
    for setting, text in cases.items():
        assert main(["train", *settings(workplace, tmp_path / "run", "dpo", setting)]) in (1, 2)
        assert text in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "run").exists()
