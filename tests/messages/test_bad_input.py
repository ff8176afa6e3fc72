"""What bad input gets: an error of the right kind that says what to do, and model and files as they were."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lorafa
from adapter_toys import assert_unchanged, everything, train
from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    LoraError,
    NotAvailableError,
    SourceError,
    TargetError,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.v_proj(self.q_proj(x).tanh()))


class Model(nn.Module):
    """Two blocks between an embedding and a head; one parameter is frozen already."""

    def __init__(self, depth: int = 2, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 10)
        self.layers[0].q_proj.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"target_modules": ["q_proj", "v_proj"], "r": 4} | settings))


@contextmanager
def refused(model: nn.Module, kind: type[LoraError], text: str) -> Iterator[None]:
    """The block raises ``kind`` with ``text`` in its message, and the model is bit-identical after it."""
    before = everything(model)
    with pytest.raises(kind, match=re.escape(text)) as caught:
        yield
    assert type(caught.value) is kind
    assert_unchanged(before, model)


NO_LAYER = [
    (
        {"target_modules": ["q_prj"]},
        "target_modules: 'q_prj' matches nothing in the model. Did you mean 'q_proj'? The last names of its layers "
        "that can carry an adapter are: attention, conv, embed, head, out_proj, q_proj, v_proj.",
    ),
    (
        {"target_modules": ["q_proj", "k_proj", "o_proj"]},
        "target_modules: 'k_proj', 'o_proj' match nothing in the model.",
    ),
    ({"target_modules": "q_proj"}, "a single string is a regular expression for the whole name."),
    ({"target_modules": ["proj"]}, "target_modules: 'proj' matches nothing in the model."),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": [7]},
        "target_modules: 'q_proj' matches nothing in the model. It is in none of the layers that layers_to_transform=",
    ),
    ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"}, "'q_proj' matches nothing"),
    ({"target_modules": []}, "The config names no layer at all: target_modules and target_parameters are both empty."),
    (
        {"target_modules": ["q_proj"], "exclude_modules": ".*"},
        "exclude_modules='.*' takes away every layer that target_modules names. Narrow it.",
    ),
    (
        {"target_modules": None},
        "target_modules is not set, and there is no usual choice for models of type None. Set target_modules='all-line",
    ),
    ({"rank_pattern": {"q_prj": 2}}, "rank_pattern: 'q_prj' matches nothing in the model. Did you mean 'q_proj'?"),
    ({"rank_pattern": {"head": 2}}, "rank_pattern: 'head' matches nothing in the model."),
    ({"alpha_pattern": {"v": 2}}, "alpha_pattern: 'v' matches nothing in the model."),
    (
        {"target_parameters": ["experts.upp"]},
        "target_parameters: 'experts.upp' matches nothing in the model. Did you mean 'up'? The last names of its "
        "parameters are: bias, in_proj_bias, in_proj_weight, up, weight.",
    ),
    (
        {"modules_to_save": ["haed"]},
        "modules_to_save: 'haed' matches no module. Did you mean 'head'? The last names of",
    ),
    ({"trainable_token_indices": {"embedd": [1]}}, "trainable_token_indices: 'embedd' matches no module. Did you mean"),
    (
        {"trainable_token_indices": [1]},
        "trainable_token_indices: the model does not say which module is its input embedding. Name it: trainable_token",
    ),
]
WRONG_LAYER = [
    (
        {"target_modules": ["norm"]},
        "'layers.0.norm' is a LayerNorm, which cannot carry an adapter. Supported are linear, embedding and "
        "convolution layers, nn.MultiheadAttention, and single parameters by target_parameters.",
    ),
    (
        {"target_modules": ["out_proj"]},
        "'layers.0.attention.out_proj' is never called: nn.MultiheadAttention reads its weight, so an adapter on it "
        "would do nothing. Target 'layers.0.attention' instead; its out_proj gets an adapter too.",
    ),
    ({"target_parameters": ["norm.weight"]}, "target_parameters: 'layers.0.norm.weight' has 1 dimensions (8,); an ad"),
    (
        {"target_parameters": ["q_proj.weight"]},
        "target_parameters: 'layers.0.q_proj.weight' belongs to a layer that target_modules adapts as a whole.",
    ),
    (
        {"modules_to_save": ["embed"], "trainable_token_indices": {"embed": [1]}},
        "trainable_token_indices: 'embed' is also trained by modules_to_save. Take it out of one.",
    ),
    (
        {"target_modules": ["embed"], "trainable_token_indices": {"embed": [1]}},
        "trainable_token_indices: 'embed' is also trained by an adapter. Take it out of one.",
    ),
    (
        {"trainable_token_indices": {"norm": [1]}},
        "trainable_token_indices: 'norm' is a LayerNorm, not a table of rows.",
    ),
]
CONTRADICTIONS = [
    ({"target_modules": ["conv"], "r": 3}, "layers.0.conv: rank 3 is not divisible by the convolution's groups=2."),
    ({"target_modules": ["embed"], "lora_bias": True}, "embed: lora_bias is not defined on embedding layers."),
    (
        {"target_modules": [], "target_parameters": ["experts.up"], "lora_dropout": 0.1},
        "layers.0.experts.up: lora_dropout=0.1 cannot act on a bare parameter, which has no input of its own. Set lora",
    ),
    (
        {"target_modules": [], "target_parameters": ["experts.up"], "use_dora": True},
        "layers.0.experts.up: dora is not defined on experts layers. Exclude it, or use plain LoRA.",
    ),
    (
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "r": 9},
        "layers.0.q_proj: rank 9 is larger than min(out, in) = 8 of its weight (8, 8), so it has no 9 singular vectors",
    ),
    (
        {"trainable_token_indices": {"embed": [1, 10]}},
        "trainable_token_indices: 10 is outside the 10 rows of 'embed'. Resize the embedding first if these tokens are",
    ),
]
LATER = {
    "aLoRA": {"alora_invocation_tokens": [1]},
    "QA-LoRA": {"use_qalora": True},
    "VeLoRA": {"velora_config": {}},
    "MonteCLoRA": {"monteclora_config": {}},
    "KaSA": {"kasa_config": {}},
    "BD-LoRA": {"use_bdlora": {}},
    "Arrow": {"arrow_config": {}},
    "Megatron": {"megatron_config": {"a": 1}},
    "replication": {"layer_replication": [(0, 1)]},
    "tied": {"ensure_weight_tying": True},
    "EVA": {"init_lora_weights": "eva"},
    "OLoRA": {"init_lora_weights": "olora"},
    "CorDA": {"init_lora_weights": "corda"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "MiCA": {"init_lora_weights": "mica"},
    "PiSSA": {"init_lora_weights": "pissa_niter_4"},
}


@pytest.mark.parametrize(("settings", "text"), NO_LAYER + WRONG_LAYER)
@pytest.mark.filterwarnings("ignore")
def test_a_target_that_is_not_there_or_cannot_be_adapted(settings: dict[str, Any], text: str) -> None:
    model = Model()
    with refused(model, TargetError, text):
        get_peft_model(model, config(**settings))


@pytest.mark.parametrize(("settings", "text"), CONTRADICTIONS)
def test_settings_that_do_not_go_with_a_layer(settings: dict[str, Any], text: str) -> None:
    model = Model()
    with refused(model, ConfigError, text):
        get_peft_model(model, config(**settings))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("r", 0, "r must be an integer >= 1, found 0 (int)."),
        ("r", "8", "r must be an integer >= 1, found '8' (str). Pass r=8 if that is meant."),
        ("lora_dropout", 1.5, "lora_dropout must be a probability in [0, 1), found 1.5."),
        ("init_lora_weights", "pisa", "init_lora_weights has no value 'pisa'. Did you mean 'pissa'?"),
        ("bias", "lora", "bias has no value 'lora'. Did you mean 'lora_only'?"),
    ],
)
def test_values_that_are_not_allowed_are_refused_when_made_and_when_set_later(
    field: str, value: object, text: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        config(**{field: value})
    model, changed = Model(), config()
    setattr(changed, field, value)
    with refused(model, ConfigError, text):
        get_peft_model(model, changed)


@pytest.mark.parametrize("feature", list(LATER))
@pytest.mark.filterwarnings("ignore")
def test_features_of_later_versions_are_named_and_never_ignored(feature: str) -> None:
    model = Model()
    field = next(iter(LATER[feature]))
    wanted = config(**LATER[feature])
    if not getattr(wanted, field):
        pytest.skip(f"{field} is off by default")
    with refused(model, NotAvailableError, field) as _:
        get_peft_model(model, wanted)
    with pytest.raises(NotAvailableError, match="not available"):
        get_peft_model(model, wanted)


def test_a_start_from_the_weight_without_computing_one() -> None:
    model = Model()
    with refused(model, ConfigError, "init_lora_weights='pissa' computes its start from the weight, but low_cpu_mem"):
        get_peft_model(model, config(init_lora_weights="pissa"), low_cpu_mem_usage=True)


def test_an_exclusion_that_matches_nothing_is_said_and_harmless() -> None:
    with pytest.warns(UserWarning, match=re.escape("exclude_modules: 'k_prj' matches nothing in the model.")):
        get_peft_model(Model(), config(exclude_modules=["k_prj"]))


def test_dropout_that_cannot_act_is_said() -> None:
    with pytest.warns(UserWarning, match=re.escape("embed: lora_dropout does not act on embedding layers")):
        get_peft_model(Model(), config(target_modules=["embed"], lora_dropout=0.1))


# ---- names


@pytest.mark.parametrize("name", ["", "a.b", None, 3])
def test_names_that_cannot_be_part_of_a_parameter_name(name: Any) -> None:
    model = Model()
    with refused(model, AdapterError, f"An adapter name is a non-empty string without a dot, found {name!r}."):
        get_peft_model(model, config(), adapter_name=name)


@pytest.mark.parametrize("name", ["items", "training", "forward", "pop"])
def test_names_that_torch_needs_itself(name: str) -> None:
    model = Model()
    with refused(model, AdapterError, f"{name!r} cannot be an adapter name: torch's containers of modules have an"):
        get_peft_model(model, config(), adapter_name=name)


CALLS: list[tuple[Callable[[PeftModel], Any], str]] = [
    (
        lambda m: m.add_adapter("default", config()),
        "The model already has an adapter 'default'. Choose another name, or",
    ),
    (
        lambda m: m.set_adapter("defualt"),
        "The model has no adapter 'defualt'. Did you mean 'default'? It has: default.",
    ),
    (lambda m: m.set_adapter(["default"]), "PeftModel.set_adapter takes one name, found ['default']. To let several"),
    (lambda m: m.base_model.set_adapter(["default", "x"]), "The model has no adapter 'x'. It has: default."),
    (lambda m: m.delete_adapter("other"), "The model has no adapter 'other'. It has: default."),
    (lambda m: m.set_requires_grad("other"), "The model has no adapter 'other'. It has: default."),
    (lambda m: m.merge_adapter(["other"]), "The model has no adapter 'other'. It has: default."),
    (lambda m: m.merge_and_unload(adapter_names=["other"]), "The model has no adapter 'other'. It has: default."),
    (lambda m: lorafa.get_peft_model_state_dict(m, adapter_name="x"), "The model has no adapter 'x'. It has: default."),
    (lambda m: lorafa.set_peft_model_state_dict(m, {}, "x"), "The model has no adapter 'x'. It has: default."),
    (lambda m: get_peft_model(m, config()), "The model is a PeftModel already. Call add_adapter() to put another"),
]


@pytest.mark.parametrize(("call", "text"), CALLS)
def test_calls_with_a_name_that_is_taken_or_unknown(call: Callable[[PeftModel], Any], text: str) -> None:
    model = train_model()
    with refused(model, AdapterError, text):
        call(model)
    assert model.active_adapters == list(model.peft_config) == ["default"]


def test_a_second_adapter_that_trains_biases() -> None:
    model = get_peft_model(Model(), config(bias="all"))
    text = "bias='lora_only': adapter 'default' trains base biases already, and there is only one set of them."
    with refused(model, ConfigError, text):
        model.add_adapter("b", config(bias="lora_only"))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: get_peft_model(Model(), config(), mixed=True), "mixed=True: models with adapters of several kinds"),
        (
            lambda m: m(torch.zeros(1, 2).long(), adapter_names=["a"]),
            "adapter_names: batches that mix adapters are not",
        ),
        (lambda m: m.generate(adapter_names=["a"]), "adapter_names: batches that mix adapters are not available yet"),
        (
            lambda m: m.save_pretrained("x", safe_serialization=False),
            "lorafa writes safetensors only; a pickle can run",
        ),
    ],
)
def test_calls_of_peft_that_are_not_there_say_so(call: Callable[[PeftModel], Any], text: str) -> None:
    model = train_model()
    with refused(model, NotAvailableError, text):
        call(model)


def test_a_model_without_adapters_has_no_state_of_one() -> None:
    with pytest.raises(AdapterError, match="This Model carries no adapter of lorafa"):
        lorafa.get_peft_model_state_dict(Model())


def test_a_model_is_unloaded_once() -> None:
    model = train_model()
    model.unload()
    with pytest.raises(AdapterError, match="The adapters were taken off this model already"):
        model.merge_and_unload()


# ---- files


def train_model(**settings: Any) -> PeftModel:
    model = get_peft_model(Model(), config(**settings))
    train(model)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_model().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-100])


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


KEY = "base_model.model.layers.0.q_proj.lora_A.weight"
FILES: dict[str, tuple[Callable[[Path], Any], type[LoraError], str]] = {
    "cut off": (cut, CheckpointError, "was cut off: 100 of "),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), CheckpointError, "(0 bytes long). Fetch or save it again."),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 99), CheckpointError, "is no safetensors file"),
    "nan": (
        lambda f: edit_tensors(f, lambda t: t[KEY].fill_(float("nan"))),
        CheckpointError,
        f"holds values that are not finite (NaN or infinity) in 1 of 8 tensors: {KEY}.",
    ),
    "infinity": (lambda f: edit_tensors(f, lambda t: t[KEY].fill_(float("inf"))), CheckpointError, "not finite"),
    "missing key": (
        lambda f: edit_tensors(f, lambda t: t.pop(KEY)),
        CheckpointError,
        "does not fit adapter 'other'.\n  missing in the file (1):\n    layers.0.q_proj.lora_A.weight",
    ),
    "unexpected key": (
        lambda f: edit_tensors(f, lambda t: t.update({KEY.replace("q_proj", "k_proj"): torch.zeros(4, 8)})),
        CheckpointError,
        "not in the model (1):\n    layers.0.k_proj.lora_A.weight",
    ),
    "another rank": (
        lambda f: edit_config(f, r=2),
        CheckpointError,
        "The file has rank 4, the adapter rank 2. Make the adapter with r=4.\nNothing was loaded.",
    ),
    "another formula": (
        lambda f: edit_config(f, use_dora=True),
        CheckpointError,
        "Only the model uses use_dora, the file does not: the two configs differ.",
    ),
    "unknown key in the config": (
        lambda f: edit_config(f, use_magic=True),
        ConfigError,
        "The config sets use_magic=True, which lorafa",
    ),
    "value that is not allowed": (
        lambda f: edit_config(f, r=0),
        ConfigError,
        "r must be an integer >= 1, found 0 (int)",
    ),
    "config of another method": (
        lambda f: edit_config(f, peft_type="IA3"),
        ConfigError,
        "peft_type has no value 'IA3'.",
    ),
    "later feature": (lambda f: edit_config(f, use_qalora=True), NotAvailableError, "QA-LoRA (use_qalora=True)"),
    "config that is no json": (lambda f: (f / CONFIG).write_text("{"), CheckpointError, "is not a json file: "),
    "no config": (lambda f: (f / CONFIG).unlink(), SourceError, f"has no {CONFIG}; it holds: "),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), SourceError, f"has no {WEIGHTS} or adapter_model.bin; it holds: "),
    "no folder": (shutil.rmtree, SourceError, "There is no folder "),
    "pickle": (to_pickle, CheckpointError, "is a pickle, and opening a pickle can run any code its author put in."),
}


@pytest.mark.parametrize("damage", list(FILES))
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_cannot_be_used_changes_neither_a_base_nor_an_adapted_model(folder: Path, damage: str) -> None:
    act, kind, text = FILES[damage]
    act(folder)
    files = contents(folder.parent)
    base = Model()
    with refused(base, kind, text.replace("'other'", "'default'")):
        PeftModel.from_pretrained(base, folder)
    model = train_model(target_modules=["q_proj", "head"])
    with refused(model, kind, text):
        model.load_adapter(folder, "other")
    assert list(model.peft_config) == model.active_adapters == ["default"]
    assert contents(folder.parent) == files


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("value", [None, False, "", {}, []])
def test_an_unknown_key_without_a_value_is_harmless(folder: Path, value: object) -> None:
    edit_config(folder, use_magic=value)
    PeftModel.from_pretrained(Model(), folder)


def test_a_pickle_is_read_when_it_is_asked_for(folder: Path) -> None:
    wanted = load_file(folder / WEIGHTS)
    to_pickle(folder)
    model = PeftModel.from_pretrained(Model(), folder, allow_pickle=True)
    state = lorafa.get_peft_model_state_dict(model)
    assert all(torch.equal(state[key], value) for key, value in wanted.items())


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda: Model(depth=3), "The file has layers 0..1, the model 0..2: the depth or layers_to_transform differs."),
        (lambda: nn.Sequential(nn.Linear(8, 8)), "target_modules: 'q_proj', 'v_proj' match nothing in the model."),
        (lambda: nn.ModuleDict({"body": Model()}), "The file was made with another wrapping of the model"),
        (lambda: nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)}), "No name is in both"),
    ],
    ids=["deeper", "without the layers", "wrapped", "another architecture"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_file_for_another_architecture(folder: Path, other: Callable[[], nn.Module], text: str) -> None:
    model = other()
    with refused(model, TargetError if "match nothing" in text else CheckpointError, text):
        PeftModel.from_pretrained(model, folder)


def test_a_file_for_other_base_weights(folder: Path) -> None:
    model = Model(seed=1)
    text = (
        "was made for another base model: 4 of 4 adapted layers have other weights here: layers.0.q_proj, layers.0.v_p"
    )
    with refused(model, CheckpointError, text):
        PeftModel.from_pretrained(model, folder)
    PeftModel.from_pretrained(model, folder, ignore_base_mismatch=True)


def test_a_file_into_an_adapter_of_other_settings(folder: Path) -> None:
    model = train_model(r=2)
    with refused(model, CheckpointError, "The file has rank 4, the adapter rank 2. Make the adapter with r=4."):
        model.load_adapter(folder, "default")


def test_a_state_dict_that_does_not_fit() -> None:
    model = train_model()
    state = {key: value.clone() for key, value in lorafa.get_peft_model_state_dict(model).items()}
    state[KEY] = torch.zeros(3, 8)
    with refused(model, CheckpointError, "layers.0.q_proj.lora_A.weight: the file has 3x8, the model 4x8"):
        lorafa.set_peft_model_state_dict(model, state)
    assert not torch.equal(model.get_parameter(KEY.replace("lora_A", "lora_A.default")), torch.zeros(4, 8))


# ---- saving


@contextmanager
def disk_with_room_for(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 100, 1200])
def test_a_full_disk_leaves_the_saved_adapter_and_no_trace(folder: Path, room: int) -> None:
    """100 bytes stop the weights; where those fit, the config or the side entry is stopped."""
    before, model = contents(folder), train_model(r=1)
    with refused(model, CheckpointError, "could not be written: "), disk_with_room_for(room):
        model.save_pretrained(folder)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)
    PeftModel.from_pretrained(Model(), folder)


def test_a_disk_that_fills_up_after_the_weights_leaves_the_old_adapter_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafa.io import adapter_files

    def full(path: Path, value: object) -> None:
        raise CheckpointError(f"{path} could not be written: No space left on device.")

    before, model = contents(folder), train_model()
    monkeypatch.setattr(adapter_files, "write_json", full)
    with refused(model, CheckpointError, f"{folder / CONFIG} could not be written: No space left"):
        model.save_pretrained(folder)
    assert contents(folder) == before


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    model = train_model()
    with refused(model, CheckpointError, "is a file, not a folder. Choose a folder to save to."):
        model.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_saving_an_adapter_that_is_not_there_writes_nothing(tmp_path: Path) -> None:
    model = train_model()
    with refused(model, AdapterError, "The model has no adapter 'b'. It has: default."):
        model.save_pretrained(tmp_path, selected_adapters=["default", "b"])
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_merged() -> None:
    model = train_model()
    with torch.no_grad():
        model.get_parameter(KEY.replace("lora_A", "lora_A.default"))[0, 0] = float("inf")
    with refused(
        model, AdapterError, "Merging 'default' gives inf or nan in a weight of LoraLinear; nothing was merged."
    ):
        model.merge_adapter()
