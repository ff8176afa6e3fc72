"""`lorafa merge` and merge_to_folder: files carried along, what does not go, and faults after which nothing is left."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorafa import LoraConfig, PeftModel, check_merged_folder, get_peft_model, merge_to_folder
from lorafa.cli.main import main
from lorafa.errors import AdapterError, BackendError, CheckpointError, ConfigError, LoraError, SourceError
from lorafa.io.changes import Change
from lorafa.storage import model_writer
from toys.adapters import train
from toys.language_models import llama, switch, t5
from toys.merging import Place, assert_same_files, config_in, place, tensors_in
from toys.workplace import make_workplace, settings

QUERY: dict[str, Any] = {"target_modules": ["q_proj"]}


@pytest.fixture
def there(tmp_path: Path) -> Place:
    return place(tmp_path, llama, **QUERY)


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(there: Place, kind: type[LoraError], text: str, **arguments: Any) -> None:
    """Refused with this text, and every file is as it was: nothing was written, nothing is left."""
    before = bytes_in(there.folder)
    adapter = arguments.pop("adapter", there.adapter)
    with pytest.raises(kind, match=text):
        merge_to_folder(adapter, there.out, **{"base": there.base} | arguments)
    assert bytes_in(there.folder) == before


# ---- the command


def test_the_command_writes_what_merging_in_memory_saves(there: Place, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(there.adapter), "--base", str(there.base), "--out", str(there.out)]
    assert main(["merge", *words, "--verify"]) == 0
    assert_same_files(there.out, there.merged_in_memory())
    said = capsys.readouterr().out
    assert "2 weights changed" in said
    assert "Verified: largest error" in said
    assert main(["merge", *words]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["merge", *words, "--overwrite", "--dtype", "float32", "--max-shard-size", "5KB"]) == 0
    assert {tensor.dtype for tensor in tensors_in(there.out).values()} == {torch.float32}
    assert all(path.stat().st_size < 7000 for path in there.out.glob("*.safetensors"))


def test_a_run_and_an_adapter_that_name_their_base_need_no_other_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_workplace(tmp_path)
    words = [*settings(folder, folder / "run"), "train.steps=2", "train.checkpoint_every=0", "eval.size=0"]
    assert main(["train", *words]) == 0
    for name in ("run", "run/adapter"):
        out = folder / name.replace("/", " ")
        assert main(["merge", str(folder / name), "--out", f"{out} merged"]) == 0, capsys.readouterr().err
    model = PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto"), folder / "run" / "adapter"
    )
    wanted = model.merge_and_unload().state_dict()
    for name in ("run merged", "run adapter merged"):
        found = tensors_in(folder / name)
        assert all(torch.equal(found[key], wanted[key]) for key in found)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer.chat_template == transformers.AutoTokenizer.from_pretrained(folder / "model").chat_template
    shutil.rmtree(folder / "run" / "adapter")
    assert main(["merge", str(folder / "run"), "--out", str(folder / "no")]) == 2
    assert "has no adapter" in capsys.readouterr().err


def test_new_tokens_come_with_their_rows_and_their_tokenizer(tmp_path: Path) -> None:
    folder = make_workplace(tmp_path)
    words = [*settings(folder, folder / "run"), "train.steps=2", "train.checkpoint_every=0", "eval.size=0"]
    assert main(["train", *words, "model.add_tokens=[' apples']"]) == 0
    assert main(["merge", str(folder / "run"), "--out", str(folder / "out"), "--verify"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "out")
    assert len(tokenizer(" apples", add_special_tokens=False).input_ids) == 1
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "out")
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == len(tokenizer)


# ---- what goes along


def test_files_of_the_base_go_along_and_those_of_other_weights_do_not(there: Place) -> None:
    carried = {
        "generation_config.json": '{"temperature": 0.5}', "tokenizer_config.json": "{}", "tokenizer.json": "{}",
        "chat_template.jinja": "{{ 1 }}", "LICENSE": "free",
    }  # fmt: skip
    for name, text in (carried | {"README.md": "the base", "pytorch_model.bin": "x", "notes.txt": "mine"}).items():
        (there.base / name).write_text(text)
    merge_to_folder(there.adapter, there.out, base=there.base)
    names = {path.name for path in there.out.iterdir()}
    assert carried.keys() <= names
    assert not names & {"README.md", "pytorch_model.bin", "notes.txt", "adapter_config.json"}
    assert all((there.out / name).read_text() == text for name, text in carried.items())


def test_a_tokenizer_beside_the_adapter_takes_the_place_of_the_base_one(there: Place) -> None:
    for folder, text in ((there.base, '{"a": 1}'), (there.adapter, '{"b": 2}')):
        (folder / "tokenizer_config.json").write_text(text)
    (there.base / "special_tokens_map.json").write_text("{}")
    merge_to_folder(there.adapter, there.out, base=there.base)
    assert (there.out / "tokenizer_config.json").read_text() == '{"b": 2}'
    assert not (there.out / "special_tokens_map.json").exists()


def test_tensors_the_model_has_no_place_for_stay_and_spare_copies_of_a_tied_head_follow(tmp_path: Path) -> None:
    """Some checkpoints hold more than transformers reads: other programs may read it."""
    there = place(tmp_path, partial(llama, tie_word_embeddings=True), target_modules=["embed_tokens", "lm_head"],
                  ensure_weight_tying=True)  # fmt: skip
    (there.base / "model.safetensors.index.json").unlink()
    tensors = tensors_in(there.base)
    for path in there.base.glob("*.safetensors"):
        path.unlink()
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "mtp.weight": torch.ones(3)}
    save_file(tensors, there.base / "model.safetensors")
    merge_to_folder(there.adapter, there.out, base=there.base)
    found, wanted = tensors_in(there.out), tensors_in(there.merged_in_memory())
    assert torch.equal(found["mtp.weight"], torch.ones(3))
    assert torch.equal(found["lm_head.weight"], wanted["model.embed_tokens.weight"])
    assert torch.equal(found["model.embed_tokens.weight"], wanted["model.embed_tokens.weight"])


def test_files_keep_their_names_and_their_tensors(there: Place) -> None:
    result = merge_to_folder(there.adapter, there.out, base=there.base)
    assert result.files > 1
    index = json.loads((there.base / "model.safetensors.index.json").read_text())["weight_map"]
    assert json.loads((there.out / "model.safetensors.index.json").read_text())["weight_map"] == index
    changed = [name for name, tensor in tensors_in(there.out).items() if not tensor.equal(tensors_in(there.base)[name])]
    assert len(changed) == result.changed == 2


def test_the_sum_is_rounded_once_to_a_dtype_that_is_asked_for(tmp_path: Path) -> None:
    there = place(tmp_path, llama, dtype=torch.float32, **QUERY)
    merge_to_folder(there.adapter, there.out, base=there.base, dtype="float16")
    wanted = tensors_in(there.merged_in_memory())
    assert all(torch.equal(tensor, wanted[name].half()) for name, tensor in tensors_in(there.out).items())
    assert config_in(there.out)["dtype"] == "float16"


def test_an_adapter_may_be_named_by_its_file(there: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(there.folder)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **settings: pytest.fail("asked the Hub"))
    merge_to_folder("adapter/adapter_model.safetensors", there.out, base=there.base)
    assert_same_files(there.out, there.merged_in_memory())


def test_updates_of_several_adapters_are_summed(there: Place) -> None:
    second = there.add_adapter("second", seed=2, target_modules=["q_proj", "v_proj"], r=2)
    merge_to_folder([there.adapter, second], there.out, base=there.base)
    model = PeftModel.from_pretrained(there.loaded(), there.adapter)
    model.load_adapter(second, "second")
    model.base_model.set_adapter(["default", "second"])
    wanted = model.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors_in(there.out).items())
    assert check_merged_folder(there.out, [there.adapter, second], base=there.base).explained
    assert not check_merged_folder(there.out, [second], base=there.base).explained


def test_a_head_of_classes_that_the_base_lacks_comes_from_the_adapter(tmp_path: Path) -> None:
    there = place(tmp_path, llama)
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(there.base, num_labels=5, dtype="auto")
    model = get_peft_model(base, LoraConfig(r=2, task_type="SEQ_CLS", **QUERY))
    train(model)
    model.save_pretrained(there.adapter)
    with pytest.warns(UserWarning, match="tensors of the base have no place in a LlamaForSequenceClassification"):
        merge_to_folder(there.adapter, there.out, base=there.base)
    wanted, found = model.merge_and_unload().state_dict(), tensors_in(there.out)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(there.out, output_loading_info=True)
    assert again.config.num_labels == 5
    assert not info["missing_keys"]


def test_an_adapter_of_peft_with_a_start_that_moved_the_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    there = place(tmp_path, llama, dtype=torch.float32)
    model = peft.get_peft_model(there.loaded(), peft.LoraConfig(r=2, init_lora_weights="pissa", **QUERY))
    train(model)
    model.save_pretrained(there.adapter)
    merge_to_folder(there.adapter, there.out, base=there.base)
    assert_same_files(there.out, there.merged_in_memory())
    wanted = model.merge_and_unload().state_dict()
    assert all(torch.allclose(one, wanted[name], atol=1e-5) for name, one in tensors_in(there.out).items())


# ---- what does not go


def without(folder: Path, part: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if part not in name}, path)


def test_an_adapter_that_does_not_fit_is_refused(there: Place, tmp_path: Path) -> None:
    other = place(tmp_path / "other", partial(llama, hidden_size=32), **QUERY)
    refused(there, CheckpointError, "was made for another base model", adapter=other.adapter)
    refused(there, CheckpointError, "does not fit|another shape", adapter=other.adapter, ignore_base_mismatch=True)
    without(there.adapter, "layers.1")
    refused(there, CheckpointError, "does not fit|missing")


def test_another_base_of_the_same_shapes_is_refused_unless_it_is_meant(there: Place) -> None:
    shutil.rmtree(there.base)
    model: Any = llama().to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data += 1
    model.save_pretrained(there.base, max_shard_size="4KB")
    refused(there, CheckpointError, "was made for another base model")
    merge_to_folder(there.adapter, there.out, base=there.base, ignore_base_mismatch=True)
    assert there.out.is_dir()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"alora_invocation_tokens": [3]}, "changes with the input, so there is no matrix"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers .layer_replication."),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 1}}, "that its start has quantized"),
    ],
    ids=["routed", "replicated", "loftq"],
)
def test_updates_that_no_weight_holds_are_refused(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    there = place(tmp_path, llama, dtype=torch.float32, **QUERY | settings)
    refused(there, BackendError, text)


def test_a_bias_that_the_base_has_no_place_for_is_refused(tmp_path: Path) -> None:
    there = place(tmp_path, llama, lora_bias=True, **QUERY)
    refused(there, BackendError, r"q_proj: lora_bias cannot be merged into a Linear without a bias")


def test_a_quantized_base_is_refused(there: Place) -> None:
    config = config_in(there.base) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (there.base / "config.json").write_text(json.dumps(config))
    refused(
        there, BackendError, r"is quantized \(bitsandbytes\): its files hold codes.*Give the model it was quantized"
    )


def test_two_adapters_that_want_one_place_are_refused(there: Place) -> None:
    names = ["one", "two"]
    for seed, name in enumerate(names):
        there.add_adapter(name, seed=seed, modules_to_save=["norm"], **QUERY)
    refused(there, AdapterError, "cannot count together", adapter=[there.folder / name for name in names])


@pytest.mark.parametrize("target", ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"])
def test_weights_that_a_model_always_shares_are_not_torn_apart(target: str, tmp_path: Path) -> None:
    """T5's config says by tie_word_embeddings=false that outputs are not scaled, and ties the tables all the same."""
    there = place(tmp_path, t5, target_modules=[target])
    refused(there, CheckpointError, "always shares one weight among .*Train the adapter with ensure_weight_tying=True")


def test_a_head_is_not_untied_where_outputs_depend_on_what_the_config_says_of_it(tmp_path: Path) -> None:
    there = place(tmp_path, switch, target_modules=["lm_head"])
    refused(there, CheckpointError, "always shares one weight among shared.weight, .*lm_head.weight")


def test_weights_that_a_model_always_shares_are_merged_as_one(tmp_path: Path) -> None:
    there = place(tmp_path, t5, target_modules=["shared"], ensure_weight_tying=True)
    merge_to_folder(there.adapter, there.out, base=there.base)
    found = transformers.AutoModelForSeq2SeqLM.from_pretrained(there.out, dtype="auto").state_dict()
    wanted = PeftModel.from_pretrained(there.loaded(), there.adapter).merge_and_unload().state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert config_in(there.out) == config_in(there.base)


def test_wrong_arguments_are_refused(there: Place) -> None:
    refused(there, ConfigError, "dtype is one of float32, bfloat16, float16", dtype="int8")
    refused(there, ConfigError, "max_shard_size is a number of bytes .*found 'large'", max_shard_size="large")
    refused(there, ConfigError, "max_shard_size", max_shard_size=0)
    refused(there, ConfigError, "no adapter was given", adapter=[])
    refused(there, ConfigError, "is given twice, and its update would count twice", adapter=[there.adapter] * 2)
    refused(there, SourceError, "no adapter_config.json", adapter=there.base)
    refused(there, SourceError, "No model 'gone/away/x'", base="gone/away/x")
    for wrong in (there.base, there.folder):
        with pytest.raises(ConfigError, match=r"is, or holds, the base model|not the folder of a model"):
            merge_to_folder(there.adapter, wrong, base=there.base, overwrite=True)
    config = there.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    refused(there, ConfigError, "does not name its base model. Give it: base=", base=None)


# ---- faults


def test_a_cut_off_shard_is_refused_before_anything_is_written(there: Place) -> None:
    path = sorted(there.base.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-10])
    refused(there, CheckpointError, r"was cut off: 10 of \d+ bytes are missing")


def test_a_missing_shard_is_refused(there: Place) -> None:
    sorted(there.base.glob("*.safetensors"))[0].unlink()
    refused(there, SourceError, "which is not in its folder. Fetch the missing file")


def fails_at(count: int, error: BaseException, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` until the call number ``count``, which raises."""
    calls = 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            raise error
        return run(*arguments, **named)

    return counted


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("place_of_fault", ["_write", "_copy", "_reserve", "os.fsync"])
def test_a_disk_that_fills_up_leaves_nothing(
    place_of_fault: str, count: int, there: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner: Any = os if place_of_fault == "os.fsync" else model_writer
    name = place_of_fault.removeprefix("os.")
    monkeypatch.setattr(owner, name, fails_at(count, FULL, getattr(owner, name)))
    refused(there, CheckpointError, r"merged\S* could not be written: No space left on device.* Nothing was changed")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_interrupt_leaves_nothing(error: BaseException, there: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Change, "values", fails_at(2, error, Change.values))
    before = bytes_in(there.folder)
    with pytest.raises(type(error)):
        merge_to_folder(there.adapter, there.out, base=there.base)
    assert bytes_in(there.folder) == before


def test_a_real_limit_of_a_file_leaves_nothing(there: Place) -> None:
    """The system itself refuses, in the middle of a file."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        refused(there, CheckpointError, "could not be written: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_values_that_overflow_leave_nothing(tmp_path: Path) -> None:
    there = place(tmp_path, llama, dtype=torch.float16, **QUERY)
    path = there.adapter / "adapter_model.safetensors"
    save_file({name: tensor * 300 for name, tensor in load_file(path).items()}, path)
    refused(there, AdapterError, "gives inf or nan in a Linear once rounded to its dtype")
    large = place(tmp_path / "large", llama, dtype=torch.float32, **QUERY)
    tensors = {name: tensor * 1e6 for name, tensor in tensors_in(large.base).items() if "norm" not in name}
    for path in large.base.glob("*.safetensors"):
        save_file({name: tensors.get(name, tensor) for name, tensor in load_file(path).items()}, path)
    refused(large, AdapterError, "gives inf once rounded to float16", dtype="float16", ignore_base_mismatch=True)


def test_memory_holds_a_layer_and_not_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While any layer is merged, the tensors of at most two are alive: its own, and what is being written."""
    import gc

    there = place(tmp_path, partial(llama, num_hidden_layers=6, hidden_size=64, num_attention_heads=2), r=2, **QUERY)
    most, values = 0, Change.values

    def watched(self: Change, *arguments: Any) -> Any:
        nonlocal most
        made = values(self, *arguments)
        gc.collect()
        alive = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.shape == (64, 64) and not o.is_meta]
        with_memory = {o.data_ptr() for o in alive if o.stride() != (0, 0)}
        most = max(most, len(with_memory))
        return made

    monkeypatch.setattr(Change, "values", watched)
    merge_to_folder(there.adapter, there.out, base=there.base)
    assert 1 <= most <= 4, most
