"""`lorafa inspect`: what it prints, its JSON and its page, what it takes for an adapter, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.cli.main import main
from lorafa.storage.tensors import read_tensors, write_tensors
from lorafa.surgery.walk import lora_layers
from toys.adapters import train
from toys.chromium import shown
from toys.compare import close
from toys.runs import make_run
from toys.workplace import make_workplace


def adapter(place: Path, name: str, seed: int, size: float = 0.05, **settings: Any) -> PeftModel:
    """Train an adapter a little, and save it into the place."""
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_seed": seed} | settings
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(**config))
    train(model, size)
    model.save_pretrained(place / name)
    return model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three blocks, adapters of it, and a run with one."""
    folder = make_workplace(tmp_path_factory.mktemp("place"), num_hidden_layers=3)
    adapter(folder, "a", 0)
    adapter(folder, "b", 1, rank_pattern={"q_proj": 2})
    adapter(folder, "dora", 2, use_dora=True)
    adapter(folder, "some", 3, target_modules=["q_proj", "lm_head"])
    make_run(folder / "run", loss=1.0)
    shutil.copytree(folder / "a", folder / "run" / "adapter")
    make_run(folder / "young", loss=1.0, status="running")
    (folder / "mine.txt").write_text("Ann has 3 apples and gets 2 more. How many?")
    return folder


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    return place


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["inspect", *words])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def told(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    main(["inspect", *words, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_file_alone_is_told_in_tables(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, "a", "--top", "3")
    assert status == 0
    facts = dict(re.findall(r"^(\S+(?: \S+)*) {2,}(\S.*?) *$", text, flags=re.MULTILINE))
    assert facts["made for"] == str(there / "model")
    assert (facts["formula"], facts["rank"], facts["scaling"]) == ("lora", "4", "2")
    assert facts["layers"] == "21 of 7 kinds"
    rows = re.findall(r"│ (\w+_proj) +│ +3 │ +4 │ +([\d.e-]+) │ +([\d.]+)% │", text)
    assert len(rows) == 7
    assert sum(float(share) for *_, share in rows) == pytest.approx(100, abs=0.5)
    assert "The 3 of 21 layers with most of the energy" in text
    assert len(re.findall(r"│ model\.layers\.", text)) == 3


def test_a_narrow_terminal_gets_a_line_for_each_value(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    status, text = said(capsys, "a", "--top", "1")
    assert status == 0
    assert max(map(len, text.splitlines())) <= 40
    assert re.search(r"^kind: q_proj\n  layers: 3\n  rank: 4\n  norm: ", text, flags=re.MULTILINE)


def test_numbers_of_the_file_are_those_of_the_model(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "b", "--base", "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(there / "model")
    model = PeftModel.from_pretrained(base, there / "b")
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert len(layers) == 21
    for path, layer in lora_layers(model.get_base_model()):
        D, one = layer.get_delta_weight("default").double(), layers[path]
        close(torch.tensor(one["singular_values"]), torch.linalg.svdvals(D)[: one["rank"]].float(), 1e-4)
        assert one["frobenius"] == pytest.approx(float(D.norm()), rel=1e-5)
        assert one["ratio"] == pytest.approx(float(D.norm() / layer.base_weight().norm()), rel=1e-5)
        assert one["rank"] == (2 if path.endswith("q_proj") else 4)
    assert found["base"]["fits"] is True
    assert found["base"]["effect"]["kl"] > 0
    assert found["frobenius"] == pytest.approx(sum(one["frobenius"] ** 2 for one in layers.values()) ** 0.5)
    assert sum(one["share"] for one in layers.values()) == pytest.approx(1)
    alone = told(capsys, "b")
    assert [one["frobenius"] for one in alone["layers"]] == pytest.approx([x["frobenius"] for x in found["layers"]])


def test_a_run_stands_for_its_adapter(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of_run, of_adapter = told(capsys, "run"), told(capsys, "a")
    assert of_run["layers"] == of_adapter["layers"]
    assert of_run["adapter"] == "run"


def test_the_effect_is_measured_on_a_text_of_one_s_own(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = told(capsys, "a", "--base", "model", "--text", "mine.txt")["base"]["effect"]
    usual = told(capsys, "a", "--base", "model")["base"]["effect"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(there / "model")
    assert own["positions"] == len(tokenizer((there / "mine.txt").read_text()).input_ids)
    assert usual["positions"] != own["positions"]
    status, text = said(capsys, "a", "--base", "model", "--text", "mine.txt")
    assert status == 0
    assert f"{own['kl']:.4g} nats a position" in text


def test_two_adapters_are_compared_layer_by_layer(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, "a", "--other", "b")
    assert found["other"]["only_here"] == found["other"]["only_there"] == []
    assert all(-1 < layer["likeness"]["cosine"] < 1 for layer in found["layers"])
    itself = told(capsys, "a", "--other", "run")
    assert itself["other"]["cosine"] == pytest.approx(1)
    assert [one["likeness"]["rows"] for one in itself["layers"]] == pytest.approx([1] * 21)
    some = told(capsys, "a", "--other", "some")["other"]
    assert (len(some["only_here"]), some["only_there"]) == (18, ["lm_head"])
    status, text = said(capsys, "a", "--other", "some")
    assert status == 0
    assert "some: 3 common layers; 18 layers only here, 1 only there" in text


def test_dora_says_what_it_needs_the_base_for(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, alone = said(capsys, "dora", "--top", "0")
    assert "The update of dora depends on the base weights." in alone
    assert "layers with most of the energy" not in alone
    status, whole = said(capsys, "dora", "--base", "model")
    assert status == 0
    assert "depends on the base weights" not in whole


def test_intruders_are_listed(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(there, "large", 4, size=0.3)
    found = told(capsys, "large", "--base", "model")
    counted = sum(len(layer["intruders"]) for layer in found["layers"])
    assert found["base"]["intruders"] == counted > 0
    _, text = said(capsys, "large", "--base", "model", "--top", "2")
    assert f"Intruder dimensions, 2 of {counted}" in text


# ---- a base that is not the right one


def test_other_weights_are_told_and_end_with_one(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(there / "model")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(1.0)
    shutil.copytree(there / "model", tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    status, text = said(capsys, "a", "--base", str(tmp_path / "other"))
    assert status == 1
    assert "1 of 21 layers have other weights in this base" in " ".join(text.split())
    assert "norm / weight" in text


def test_an_adapter_that_does_not_go_on_the_base_is_told_all_the_same(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_workplace(tmp_path, num_hidden_layers=2)
    status, text = said(capsys, "a", "--base", str(tmp_path / "model"))
    assert status == 1
    assert "The adapter does not fit the base:" in text
    assert "Kinds of layer" in text
    assert told(capsys, "a", "--base", str(tmp_path / "model"))["base"]["missing"] != []


# ---- the page


@pytest.fixture(scope="module")
def page(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all that can be on one."""
    folder = tmp_path_factory.mktemp("page")
    words = [str(place / "a"), "--base", str(place / "model"), "--other", str(place / "b")]
    assert main(["inspect", *words, "--page", str(folder / "page.html")]) == 0
    assert [path.name for path in folder.iterdir()] == ["page.html"]
    return folder / "page.html"


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    fetched = re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?\s*([^"')\s>]+)""", text)
    assert [found for found in fetched if not found.startswith(("#", "data:"))] == []
    assert not re.search(r"<(script|link|iframe|img|object)\b", text)
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert titles == [
        "Spectra of the updates, median over layers", "Share of the energy, by block", "Effective rank, by block",
        "Norm of the update, by block and kind", "Norm of the update beside the weight, by block",
        "Cosine with the other adapter, by block",
    ]  # fmt: skip
    assert text.count("<td>model.layers.") >= 21


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window(page: Path, tmp_path: Path, width: int) -> None:
    found = shown(page, width, tmp_path)
    assert found["complaints"] == []
    assert found["scroll"] <= found["client"]
    assert (found["empty"], found["overlaps"], found["outside"]) == (0, 0, [])


def test_an_adapter_that_was_not_trained_has_a_page_too(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter(there, "fresh", 5, size=0.0)
    status, text = said(capsys, "fresh", "--page", str(tmp_path / "page.html"))
    assert status == 0
    assert f"Page: {tmp_path / 'page.html'}" in text
    assert "norm of the update  0 (Frobenius, all layers)" in text
    assert "Spectra of the updates" not in (tmp_path / "page.html").read_text()


# ---- what is refused


def damaged(place: Path, tmp_path: Path, how: str) -> Path:
    folder = tmp_path / "adapter"
    shutil.copytree(place / "a", folder)
    weights = folder / "adapter_model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "config":
        (folder / "adapter_config.json").write_text("{")
    else:
        tensors, metadata = read_tensors(weights)
        key = next(key for key in tensors if "lora_B" in key)
        tensors[key][0, 0] = float(how)
        write_tensors(weights, tensors, metadata)
    return folder


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("nan", "holds values that are not finite (NaN or infinity) in 1 of 42 tensors:"),
        ("inf", "holds values that are not finite (NaN or infinity) in 1 of 42 tensors:"),
        ("cut", "was cut off: 100 of "),
        ("config", "adapter_config.json"),
    ],
)
def test_a_damaged_file_is_named(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str, text: str
) -> None:
    status, found = said(capsys, str(damaged(there, tmp_path, how)))
    assert status == 1
    assert text in " ".join(found.split())
    assert "Traceback" not in found
    assert "not foreseen" not in found


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (("nowhere/at/all",), 1, "nowhere/at/all"),
        (("model",), 2, "'model' is a model and no adapter"),
        (("young",), 2, "The run 'young' has no adapter yet (status: running)"),
        (("a", "--text", "mine.txt"), 2, "--text is what the effect on the logits is measured on, which needs --base"),
        (("a", "--base", "model", "--text", "none.txt"), 2, "--text none.txt could not be read: No such file"),
        (("a", "--base", "nothing-here"), 1, "No model 'nothing-here'"),
        (("a", "--top", "-1"), 2, "--top is a number of layers, 0 or more, found -1"),
        (("a", "--page", "no/folder/page.html"), 1, "page.html"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(
    there: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], status: int, text: str
) -> None:
    found = said(capsys, *words)
    assert found[0] == status
    assert text in " ".join(found[1].split())
    assert "not foreseen" not in found[1]


def test_adapters_of_other_models_are_not_compared(
    there: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_workplace(tmp_path, hidden_size=64)
    adapter(tmp_path, "wide", 0)
    status, text = said(capsys, "a", "--other", str(tmp_path / "wide"))
    assert status == 1
    assert "they were made for different base models" in " ".join(text.split())
