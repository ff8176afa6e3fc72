"""What reads adapters without loading them on a model: another program's is read with the base, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafa import AutoPeftModelForCausalLM, LoraConfig, PeftModel, merge_to_folder
from lorafa.cli.main import main
from lorafa.errors import CheckpointError, ConfigError
from lorafa.export.job import export_adapter
from lorafa.inspection.adapter import inspect
from lorafa.io.adapter_files import read_adapter
from lorafa.runs.subjects import find
from lorafa.train.base_model import trained_whole, with_kind_of
from lorafa.train.settings.model import ModelConfig
from toys.compare import close
from toys.exported import by_vllm, on_disk, updates_of

PREFIX = "base_model.model."


def as_mlx(adapter: Path, folder: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    ends = {".lora_A.weight": ".lora_a", ".lora_B.weight": ".lora_b"}
    turned = {
        key.removeprefix(PREFIX).replace(old, new): value.T.contiguous()
        for key, value in tensors.items()
        for old, new in ends.items()
        if key.endswith(old)
    }
    save_file(turned, folder / "adapters.safetensors")
    numbers = {"rank": config.r, "scale": config.lora_alpha / config.r, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": numbers}))


def as_diffusers(adapter: Path, folder: Path, tensors: dict[str, Tensor], config: LoraConfig) -> None:
    """It has no alpha: that is the rank."""
    scale = config.lora_alpha / config.r
    scaled = {key: value * scale if ".lora_B." in key else value for key, value in tensors.items()}
    named = {f"text_encoder.{key.removeprefix(PREFIX)}": value for key, value in scaled.items()}
    save_file(named, folder / "pytorch_lora_weights.safetensors")


WRITERS = {"mlx": as_mlx, "diffusers": as_diffusers}


@pytest.fixture(params=WRITERS)
def files(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path, Path, Path]:
    """The adapted model, its base and its adapter in PEFT's layout and in another one."""
    model, adapter = on_disk(tmp_path, target_modules=["q_proj", "down_proj"])
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    WRITERS[request.param](Path(adapter), other, tensors, model.peft_config["default"])
    return model, tmp_path / "base", Path(adapter), other


def test_inspect_reads_them_with_the_base(
    files: tuple[Any, Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, base, adapter, other = files
    assert main(["inspect", str(other)]) == 1
    said = capsys.readouterr().err
    assert f"PeftModel.from_pretrained(base, '{next(other.glob('*.safetensors'))}').save_pretrained(folder)" in said
    kind = type(model.get_base_model())

    def load() -> tuple[Any, None]:
        return kind.from_pretrained(base), None

    found, wanted = (inspect(str(place), base=load, other=str(adapter)) for place in (other, adapter))
    assert (found.base is not None and found.base.fit.fits, found.other is not None) == (True, True)
    assert found.other is not None
    assert found.other.cosine == pytest.approx(1)
    assert [layer.update.name for layer in found.layers] == [layer.update.name for layer in wanted.layers]
    for one, same in zip(found.layers, wanted.layers, strict=True):
        assert one.measured.frobenius == pytest.approx(same.measured.frobenius, rel=1e-5)
    assert with_kind_of(ModelConfig(name=str(base)), str(other)).kind == "auto"


def test_a_base_that_is_loaded_for_them_has_no_copies_of_modules(files: tuple[Any, Path, Path, Path]) -> None:
    *_, other = files
    assert trained_whole(str(other)) == []


def test_eval_generate_and_chat_take_a_folder_of_mlx_with_its_base_and_ask_for_it(tmp_path: Path) -> None:
    model, adapter = on_disk(tmp_path, target_modules=["q_proj"])
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    (other := tmp_path / "mlx").mkdir()
    as_mlx(Path(adapter), other, tensors, model.peft_config["default"])
    assert find(str(other), str(tmp_path / "base")).adapter == str(other)
    with pytest.raises(ConfigError, match=r"mlx' does not name its base model\. Give it: --base <model>"):
        find(str(other))


def test_combine_reads_them_on_the_base(
    files: tuple[Any, Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, base, adapter, other = files
    out = tmp_path / "out"
    words = ["combine", str(other), str(adapter), "--weights", "0.5", "1", "--type", "cat", "--out", str(out)]
    alone = ["combine", str(other), "--weights", "0.5", "--type", "cat", "--out", str(out)]
    assert main(alone) == 2
    assert "layout of another program" in (said := capsys.readouterr().err)
    assert "give it by --base" in said
    assert main([*words, "--base", str(base)]) == 0, capsys.readouterr().err
    combined = PeftModel.from_pretrained(type(model.get_base_model()).from_pretrained(base), out)
    for path, update in updates_of(model).items():
        close(updates_of(combined)[path], 1.5 * update, 1e-5)


def test_export_reads_them_on_the_base(files: tuple[Any, Path, Path, Path], tmp_path: Path) -> None:
    model, base, _, other = files
    with pytest.raises(ConfigError, match=r"layout of another program.*Give that: --base"):
        export_adapter(other, "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_adapter(other, "vllm", tmp_path / "out", base=base, verify=True)
    for path, update in updates_of(model).items():
        close(by_vllm(tmp_path / "out")[path], update, 1e-5)


def test_what_takes_no_base_refuses_them_and_says_how_to_convert(
    files: tuple[Any, Path, Path, Path], tmp_path: Path
) -> None:
    _, base, _, other = files
    with pytest.raises(ConfigError, match=r"does not say what to load as its base\. Load the base and call PeftModel"):
        AutoPeftModelForCausalLM.from_pretrained(other)
    with pytest.raises(CheckpointError, match=r"is in the layout of .* Bring it into PEFT's: PeftModel"):
        merge_to_folder(other, tmp_path / "out", base=base)
    with pytest.raises(CheckpointError, match=r"is in the layout of .* Bring it into PEFT's: PeftModel"):
        read_adapter(other)


def test_the_conversion_that_is_named_is_one(files: tuple[Any, Path, Path, Path], tmp_path: Path) -> None:
    model, base, _, other = files
    file = next(other.glob("*.safetensors"))
    loaded = PeftModel.from_pretrained(type(model.get_base_model()).from_pretrained(base), str(file))
    loaded.save_pretrained(tmp_path / "converted")
    assert set(read_adapter(tmp_path / "converted").tensors) == set(read_adapter(files[2]).tensors)


def test_a_folder_without_a_config_of_peft_and_without_a_layout_is_none(tmp_path: Path) -> None:
    _, adapter = on_disk(tmp_path, target_modules=["q_proj"])
    (Path(adapter) / "adapter_config.json").write_text('{"rank": 4}')
    with pytest.raises(CheckpointError, match="is in no layout that lorafa knows"):
        read_adapter(adapter)
