"""`lorafa chat`: runs, adapters and their base side by side, by a pipe, in a terminal, and as a server."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorafa import LoraConfig, get_peft_model
from lorafa.chat.server import Server
from lorafa.cli import chat
from lorafa.cli.main import main, parse
from lorafa.runs.record import RunDirectory
from toys.adapters import train
from toys.kinds import make_t5
from toys.workplace import make_workplace, settings

NEW = ["--max-new-tokens", "6"]
QUESTIONS = "Ann has 3 apples.\nHow many?\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workplace with a run and with adapters that answer otherwise."""
    folder = make_workplace(tmp_path_factory.mktemp("place"))
    assert main(["train", *settings(folder, folder / "run"), "train.checkpoint_every=0", "eval.size=0"]) == 0
    for number, name in enumerate(("german", "french")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        torch.manual_seed(number)
        train(adapted, 0.3)
        adapted.save_pretrained(folder / name)
    return folder


@pytest.fixture
def talk(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a chat in the workplace: (words, what is typed) -> status, answers, notices."""
    monkeypatch.chdir(place)

    def run(*words: str, typed: str = QUESTIONS) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        status = main(["chat", *NEW, *words])
        said = capsys.readouterr()
        return status, said.out, " ".join(said.err.split())

    return run


def answers(text: str) -> dict[str, list[str]]:
    """Name -> its answers, of what stands one below the other."""
    found: dict[str, list[str]] = {}
    for name, said in re.findall(r"--- (.+)\n((?:.*\n)*?)\n(?=---|$)", text):
        found.setdefault(name, []).append(said.removesuffix("\n"))
    return found


def generated(place: Path, subject: str, question: str) -> str:
    (place / "one.txt").write_text(question)
    out = place / "one.jsonl"
    out.unlink(missing_ok=True)
    assert main(["generate", str(place / subject), str(place / "one.txt"), *NEW, "--out", str(out)]) == 0
    return str(json.loads(out.read_text())["output"])


def test_everyone_answers_as_generate_has_it_and_each_remembers_its_own_answers(talk: Any, place: Path) -> None:
    status, out, _ = talk("run", "de=german", "french", typed="Ann has 3 apples.\n")
    first = answers(out)
    assert status == 0
    assert list(first) == ["model", "run", "de", "french"]
    subjects = {"model": "model", "run": "run", "de": "german", "french": "french"}
    assert first == {name: [generated(place, subject, "Ann has 3 apples.")] for name, subject in subjects.items()}
    _, out, _ = talk("run", "de=german", "french")
    second = answers(out)
    assert {name: said[:1] for name, said in second.items()} == first
    _, out, _ = talk("run", "de=german", "french", typed="How many?\n")
    alone = answers(out)
    assert all(said[1:] != alone[name] for name, said in second.items())


def test_a_model_alone_answers_without_headings_and_commands_work_by_a_pipe(talk: Any) -> None:
    status, out, err = talk("model", typed="Ann has 3 apples.\n\n/reset\nAnn has 3 apples.\n/quit\nMore?\n")
    assert status == 0
    assert "---" not in out
    half = len(out) // 2
    assert out[:half] == out[half:] != ""
    assert "The conversation begins anew." in err
    assert talk("--base", "model", typed="Ann has 3 apples.\n")[1] == out[:half]


def test_an_adapter_of_a_run_is_called_as_the_run_and_names_are_made_distinct(talk: Any) -> None:
    _, out, _ = talk("run", "run/adapter", "model=german", typed="Hi\n")
    found = answers(out)
    assert list(found) == ["model-2", "run", "run-2", "model"]
    assert found["run"] == found["run-2"] != found["model"]
    _, out, _ = talk("german", "model", typed="Hi\n")  # the file of the adapter has the whole path of its base
    assert list(answers(out)) == ["model", "german"]


def test_system_prompt_template_and_sampling(talk: Any) -> None:
    plain, other = talk("german")[1], talk("german", "--system", "Be rude.")[1]
    assert plain != other != talk("german", "--template", "plain")[1]
    drawn = [talk("german", "--temperature", "1.5", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_new_tokens_of_a_run_are_its_own(talk: Any, place: Path) -> None:
    words = [*settings(place, place / "words"), "train.checkpoint_every=0", "eval.size=0", "model.add_tokens=[apples]"]
    assert main(["train", *words]) == 0
    status, out, _ = talk("words", "german", typed="Ann has 3 apples.\n")
    assert status == 0
    assert answers(out)["words"] == [generated(place, "words", "Ann has 3 apples.")]
    assert answers(out)["german"] == [generated(place, "german", "Ann has 3 apples.")]
    assert answers(out)["model"] == [generated(place, "model", "Ann has 3 apples.")]


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        ([], 2, "Nothing is named that could answer. Give adapters or runs, or a model"),
        (["nothing"], 1, "No model 'nothing'"),
        (["a=german", "a=french"], 2, "The name 'a' is given twice"),
        (["a b=german"], 2, "'a b=german' is to be name=path"),
        (["model", "x=model"], 2, "'model' and 'model' are one model, which answers once"),
        (["run", "--base", "model"], 2, "--base model is the base model of an adapter, and 'run' is a run"),
        (["german", "--max-new-tokens", "0"], 2, "--max-new-tokens must be an integer >= 1"),
        (["german", "--top-p", "0.5"], 2, "--top-p 0.5 says how tokens are drawn, and with --temperature 0 none are"),
        (["german", "--port", "80"], 2, "--port 80 is that of --serve"),
        (["german", "--serve", "--port", "70000"], 2, "--port 70000 is no port"),
        (["german", "--template", "nothing"], 2, "--template='nothing' is neither a template's name nor a file"),
    ],
)
def test_what_cannot_be_done_is_an_error(words: list[str], status: int, text: str, talk: Any) -> None:
    found = talk(*words)
    assert (found[0], found[1]) == (status, ""), found
    assert text in found[2]
    assert "Traceback" not in found[2]


def test_adapters_of_different_bases_are_refused_with_both_names(talk: Any, place: Path) -> None:
    shutil.copytree(place / "model", place / "copied", dirs_exist_ok=True)
    shutil.copytree(place / "german", place / "moved", dirs_exist_ok=True)
    config = json.loads((place / "moved" / "adapter_config.json").read_text())
    (place / "moved" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(place / "copied")})
    )
    status, out, err = talk("french", "moved")
    assert (status, out) == (2, "")
    assert f"'french' and 'moved' have different bases: '{place / 'model'}' and '{place / 'copied'}'." in err
    status, out, _ = talk("french", "moved", "--base", "model", typed="Hi\n")
    assert (status, list(answers(out))) == (0, ["model", "french", "moved"])


def test_no_control_character_of_an_adapter_s_file_reaches_the_terminal(talk: Any, place: Path) -> None:
    shutil.copytree(place / "german", place / "hostile", dirs_exist_ok=True)
    config = json.loads((place / "hostile" / "adapter_config.json").read_text())
    for base in ("\x1b[2J\x07", "owner/\x1b[2J\x07"):
        (place / "hostile" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        for words in (["hostile"], ["french", "hostile"]):
            status, out, err = talk(*words)
            assert (status, out) == (1, "")
            assert not {"\x1b", "\x07"} & {*err}


def test_an_adapter_that_was_made_for_other_weights_is_refused(talk: Any, place: Path, tmp_path: Path) -> None:
    other = make_workplace(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(other / "model")
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.weight)
    model.save_pretrained(other / "model")
    status, out, err = talk("german", "--base", str(other / "model"))
    assert (status, out) == (1, "")
    assert "q_proj" in err


def test_runs_with_other_settings_of_their_base_are_refused(talk: Any, place: Path) -> None:
    if not (place / "half").exists():
        shutil.copytree(place / "run", place / "half")
    text = (place / "half" / "config.yaml").read_text()
    (place / "half" / "config.yaml").write_text(re.sub(r"dtype: \w+", "dtype: bfloat16", text, count=1))
    assert RunDirectory.open(place / "half").config().model.dtype == "bfloat16"
    status, _, err = talk("run", "half")
    assert status == 2
    assert "'run' and 'half' were trained with different settings of their base: model.dtype=auto and bfloat16" in err
    status, out, _ = talk("run", "half", "--dtype", "float32")
    assert status == 0
    assert answers(out)["run"] == answers(out)["half"]


def test_a_question_that_is_too_long_ends_a_pipe_with_its_error(talk: Any) -> None:
    status, out, err = talk("german", typed="Hi\n" + "a" * 3000 + "\nHi\n")
    assert status == 1
    assert "leaves no room for an answer" in err
    assert len(answers(out)["german"]) == 1


def test_a_model_that_writes_no_text_is_refused(talk: Any, place: Path) -> None:
    shutil.copytree(place / "model", place / "classes", dirs_exist_ok=True)
    config = json.loads((place / "classes" / "config.json").read_text())
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=config["vocab_size"], hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2))  # fmt: skip
    bert.save_pretrained(place / "classes")
    status, _, err = talk("classes")
    assert status == 2
    assert "which writes no text" in err


@pytest.mark.slow
def test_a_model_with_an_encoder_answers_too(talk: Any, place: Path, tmp_path: Path) -> None:
    make_t5(tmp_path)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_2_SEQ_LM"))
    torch.manual_seed(1)
    train(adapted, 0.5)
    adapted.save_pretrained(tmp_path / "t5")
    status, out, _ = talk(str(tmp_path / "t5"), typed="Hi\n")
    assert status == 0
    found = answers(out)
    assert found["t5"] == [generated(place, str(tmp_path / "t5"), "Hi")]
    assert found["model"] == [generated(place, str(tmp_path / "model"), "Hi")]


def test_the_help_names_everything() -> None:
    args = parse(["chat", "a", "b=c", "--serve", "--port", "0"])
    assert (args.adapters, args.serve, args.port) == (["a", "b=c"], True, 0)
    assert chat.options_of(args).temperature == 0


# ---- as a process of its own


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "lorafa.cli.main", "chat", *words]


def asked(address: str, model: str) -> str:
    """What a server at the address answers."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hi"}]}).encode()
    request = urllib.request.Request(f"{address}v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])


def test_a_server_answers_as_its_options_say(talk: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve, found = Server.serve_forever, []

    def serve_one(server: Server, poll_interval: float = 0.01) -> None:
        thread = threading.Thread(target=serve, args=(server, poll_interval))
        thread.start()
        found.append((server.address, asked(server.address, "german")))
        server.shutdown()
        thread.join()
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "serve_forever", serve_one)
    status, out, err = talk("german", "--serve", "--port", "0", "--system", "Be rude.")
    assert status == 0
    ((address, answer),) = found
    assert out.strip() == address
    assert f"The OpenAI protocol is at {address}v1" in err
    assert answer == generated(place, "german", "Hi")


@pytest.mark.slow
def test_a_server_ends_with_ctrl_c(place: Path) -> None:
    words = command("german", "--serve", "--port", "0", *NEW)
    with subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
            found = asked(address, "german")
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0
            assert server.stderr is not None
            assert "Traceback" not in server.stderr.read()
        finally:
            server.kill()
    assert found == generated(place, "german", "Hi")


@pytest.mark.slow
def test_in_a_terminal_answers_stand_side_by_side_and_ctrl_d_leaves(place: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "100", "LINES": "30", "TERM": "xterm"}
    with subprocess.Popen(
        command("german", *NEW), cwd=place, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as chatting:
        os.close(theirs)
        seen = ""

        def until(text: str, count: int = 1) -> None:
            nonlocal seen
            while seen.count(text) < count:
                seen += os.read(ours, 65536).decode(errors="replace")

        try:
            until("\n> ")
            os.write(ours, b"Hi\n")
            until("\n> ", 2)
            os.write(ours, b"\x04")
            with suppress(OSError):  # so a terminal ends whose other side is closed
                until("never")
            assert chatting.wait(60) == 0
        finally:
            chatting.kill()
            os.close(ours)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", seen)
    assert re.search(r"model +german", plain)
    assert "Traceback" not in plain
