"""The documented commands, word by word, on a small model: they run, and the run's settings say what each key meant."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lorafa import PeftModel
from lorafa.scripts.run_exp import main
from toys.kinds import make_t5
from toys.places import ROOT
from toys.processes import free_ports, launched, run_group
from toys.workplace import ROWS, make_workplace, metrics, read

KEYS = """\\
        ++dataset_name=meta_math \\
        ++model.epochs=1 \\
        ++model.eval_epochs=1 \\
        +init=gradient \\
        ++init.direction=LoRA-FA \\
        ++init.weight="stable" \\
        ++init.stable_gamma=128 \\
        +peft=qv \\
        ++peft.lora_r=8 \\
        ++peft.use_rslora=True \\
        ++peft.lora_alpha=16 \\
        ++wandb.name=$runname \\
        ++wandb.project=lorafa \\
        ++init.iters=$iters """
ONE = f"python run_exp.py -m {KEYS}"
TWO = f"""CUDA_VISIBLE_DEVICES="0,1" accelerate launch \\
--main_process_port $(shuf -i 10000-60000 -n 1) \\
 run_exp.py -m {KEYS}"""
HERE = "++model.name=model data.file=meta.json threads=1"
"""What is not in the commands: a small model, and a copy of the data set."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(
        tmp_path_factory.mktemp("published"), hidden_size=64, intermediate_size=96, num_key_value_heads=4
    )
    rows = [
        {"query": row["question"], "response": f"{row['answer']}\nThe answer is: 1", "type": "GSM_SV"} for row in ROWS
    ]
    (folder / "meta.json").write_text(json.dumps([*rows, {"query": "q", "response": "r", "type": "MATH_SV"}]))
    shutil.copy(ROOT / "run_exp.py", folder)
    return folder


def shell(command: str, place: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    library = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PATH": path, "PYTHONPATH": library, "COLUMNS": "200"} | variables
    return subprocess.run(
        ["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.matrix(2, each_word=False)
@pytest.mark.parametrize(("command", "name"), [(ONE, "one"), (TWO, "two")], ids=["python", "accelerate launch"])
def test_a_documented_command_runs_word_by_word(place: Path, command: str, name: str) -> None:
    done = shell(f"{command} {HERE}", place, runname=name, iters="4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Note: init.weight=stable changes nothing" in done.stdout
    run = place / "runs" / name
    assert read(run / "result.json")["status"] == "finished"
    assert read(run / "result.json")["rows"] == {"train": 19, "heldout": 1, "repeated": 0, "dropped": 0, "truncated": 0}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["name"] == "meta_math"
    assert (config["train"]["epochs"], config["train"]["eval_epochs"], config["train"]["seed"]) == (1.0, 1.0, 42)
    assert (config["train"]["batch_size"], config["train"]["accumulation"]) == (1, 32)
    assert [config["init"][key] for key in ("mode", "direction", "scale", "stable_gamma", "iters")] == [
        "gradient", "LoRA-FA", "stable", 128.0, 4,
    ]  # fmt: skip
    assert config["peft"]["target_modules"] == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert [config["peft"][key] for key in ("r", "use_rslora", "lora_alpha", "lora_dropout")] == [8, True, 16, 0.0]
    assert read(run / "adapter" / "adapter_config.json")["r"] == 8


def in_two(rank: int, port: int, folder: str, words: list[str]) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    launched(rank, port)
    os._exit(main(words))


@pytest.mark.slow
def test_two_processes_are_one_run_of_the_script_whose_batch_they_share(place: Path) -> None:
    words = ["-m", "++model.name=model", "++dataset_name=rows.jsonl", "+peft=qv", "++peft.lora_r=4"]
    words += ["++model.real_batch_size=4", "++model.epochs=2", "++model.saving=false", "++model.bf16=false"]
    run_group(in_two, free_ports(1)[0], str(place), [*words, "++wandb.name=together"])
    run_group(in_two, free_ports(1)[0], str(place), [*words, "++wandb.name=together"])  # finished: it is left alone
    alone = _run(place, *words, "++wandb.name=alone")
    runs = [place / "runs" / "together", alone]
    assert [yaml.safe_load((run / "config.yaml").read_text())["train"]["accumulation"] for run in runs] == [2, 4]
    losses = [[row["loss"] for row in metrics(run) if "loss" in row] for run in runs]
    assert len(losses[0]) == len(losses[1])
    assert read(runs[0] / "environment.json")["processes"] == 2
    assert not (place / "runs" / "together-2").exists()


@pytest.mark.slow
def test_the_documented_evaluation_runs_word_by_word(place: Path) -> None:
    words = ["++model.name=model", "++dataset_name=rows.jsonl", "+peft=qv", "++peft.lora_r=4", "++wandb.name=asked"]
    run = _run(place, *words, "++model.saving=false")
    shutil.copy(ROOT / "eval_gsm8k.py", place)
    command = 'torchrun --nproc_per_node=2 eval_gsm8k.py --wandb_name="$runname"'
    done = shell(f"{command} --test_file=rows.jsonl --max_new_tokens=8", place, runname="asked", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    found = read(run / "gsm8k.json")
    assert (found["total"], len(found["answers"])) == (len(ROWS), len(ROWS))
    assert done.stdout.count("Accuracy: ") == 1


def test_the_merged_model_is_the_base_with_the_adapter_in_it(place: Path) -> None:
    words = ["++wandb.name=merged", "++model.name=model", "++dataset_name=rows.jsonl", "+init=gaussian", "+peft=all"]
    words += ["++peft.lora_r=4", "++model.bf16=false", "++model.learning_rate=1e-2", "++model.real_batch_size=4"]
    run = _run(place, *words)
    merged = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), str(run / "adapter"))
    ids = torch.tensor([AutoTokenizer.from_pretrained(run / "merged")("Ann has 2 apples").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert read(run / "result.json")["merged"] == "merged"
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    assert not torch.allclose(base(ids).logits, merged(ids).logits, atol=1e-3)


def test_a_merged_model_that_finds_no_room_leaves_the_adapter(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(place)
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    words = ["++wandb.name=full", "++model.name=model", "++dataset_name=rows.jsonl", "+peft=all", "++peft.lora_r=2"]
    assert main([*words, "threads=1"]) == 1
    assert "The merged model could not be written to 'runs/full/merged'" in capsys.readouterr().err
    assert (place / "runs" / "full" / "adapter" / "adapter_model.safetensors").is_file()
    assert read(place / "runs" / "full" / "result.json")["status"] == "failed"


def test_several_checkpoints_are_not_merged_one_into_the_other(place: Path) -> None:
    """The published merge adds up every directory it finds. Here the weights are those of the adapter, once."""
    words = ["++wandb.name=epochs", "++model.name=model", "++dataset_name=rows.jsonl", "+init=default", "+peft=all"]
    words += ["++peft.lora_r=4", "++model.bf16=false", "++model.epochs=3", "++model.eval_epochs=3"]
    run = _run(place, *words, "++model.real_batch_size=4", "++model.learning_rate=1e-2")
    assert len(list((run / "checkpoints").glob("checkpoint-*"))) >= 1
    merged = AutoModelForCausalLM.from_pretrained(run / "merged").state_dict()
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    once = PeftModel.from_pretrained(base, str(run / "adapter")).merge_and_unload().state_dict()
    for name, weight in once.items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-5, atol=1e-6)


def test_a_trained_output_head_is_in_the_adapter_and_in_the_merged_model(place: Path) -> None:
    words = ["++wandb.name=head", "++model.name=model", "++dataset_name=rows.jsonl", "+init=svd", "+peft=all_w_emb"]
    run = _run(place, *words, "++peft.lora_r=4", "++model.bf16=false", "++model.learning_rate=1e-2")
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    assert not torch.equal(merged.lm_head.weight, base.lm_head.weight)
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(stored["base_model.model.lm_head.weight"], merged.lm_head.weight)


def test_the_same_command_again_leaves_the_run_alone_and_another_seed_gets_a_directory_of_its_own(place: Path) -> None:
    words = ["++wandb.name=again", "++model.name=model", "++dataset_name=rows.jsonl", "+peft=all", "++peft.lora_r=2"]
    words += ["++model.saving=false"]
    run = _run(place, *words)
    before = (run / "result.json").read_text()
    assert _run(place, *words) == run
    assert (run / "result.json").read_text() == before
    _run(place, *words, "++seed=1")
    assert read(place / "runs" / "again-2" / "result.json")["status"] == "finished"
    assert not (run / "merged").exists()


def test_a_dry_run_shows_what_the_keys_mean_and_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["++wandb.name=dry", "++model.name=model", "++dataset_name=rows.jsonl", "+peft=all", "++peft.lora_r=2"]
    for more in ("--dry-run", "++dry_run=true"):
        _run(place, *words, more)
        assert '"keep_checkpoints": 1' in capsys.readouterr().out
    assert not (place / "runs" / "dry").exists()


def test_a_wrong_key_ends_with_2_and_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["+peft=all", "++peft.lora_r=2", "++model.epoch=1"]) == 2
    assert "run_exp.py has no key 'model.epoch'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "model.early_stopping_patience" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sweep_of_keys_has_a_run_for_each_and_shares_the_name(place: Path) -> None:
    words = ["++wandb.name=sweep", "++model.name=model", "++dataset_name=rows.jsonl", "+peft=all", "++peft.lora_r=2,3"]
    _run(place, "-m", *words, "++model.saving=false", "++seed=5,6")
    found = read(place / "runs" / "sweep" / "sweep.json")["points"]
    assert [row["name"] for row in found] == [f"peft.lora_r={r},seed={seed}" for r in (2, 3) for seed in (5, 6)]
    assert {row["status"] for row in found} == {"finished"}
    config = yaml.safe_load((place / "runs" / "sweep" / "peft.lora_r=3,seed=6" / "config.yaml").read_text())
    assert (config["peft"]["r"], config["train"]["seed"]) == (3, 6)


def _run(place: Path, *words: str) -> Path:
    """Run the script here, in the folder, and return the directory that its name asks for."""
    before = Path.cwd()
    os.chdir(place)
    try:
        assert main([*words, "threads=1"]) == 0
    finally:
        os.chdir(before)
    return place / "runs" / next(word.partition("=")[2] for word in words if word.startswith("++wandb.name="))


def test_t5_is_trained_on_glue_as_the_scripts_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_t5(tmp_path)
    table = [{"sentence": f"{first} film is {word}", "label": at % 2} for first in ("a", "the") for at, word in
             enumerate(("good", "bad", "fine", "poor", "nice"))]  # fmt: skip
    (tmp_path / "sst2.jsonl").write_text("\n".join(map(json.dumps, table)))
    monkeypatch.chdir(tmp_path)
    words = (
        "model=t5base +init=gradient +peft=qv_w_emb ++peft.lora_r=2 ++init.stable_gamma=128 ++dataset_name=sst2 "
        "++model.name=model ++model.real_batch_size=4 ++model.per_device_batch_size=4 ++wandb.name=t5 "
        "data.file=sst2.jsonl data.eval_size=2 threads=1"
    )
    assert main(words.split()) == 0
    result = read(tmp_path / "runs" / "t5" / "result.json")
    assert (result["status"], result["kind"], result["rows"]["train"]) == ("finished", "seq2seq", 8)
    assert (tmp_path / "runs" / "t5" / "merged" / "config.json").is_file()
