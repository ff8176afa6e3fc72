"""Calls of PEFT's LoRA documentation under its name, and scripts run by `lorafa run`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toys.by_name import by_name, found_by_name
from toys.places import ROOT

DOCUMENTED = """
import sys
from pathlib import Path
import torch
import peft
from peft import AutoPeftModelForCausalLM, LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.loraga import estimate_gradients
from peft.tuners.lora.config import CordaConfig
from toys.language_models import IDS, llama, logits

here, found = Path(sys.argv[1]), {}

def base():
    torch.manual_seed(0)
    return llama().eval()

def same(one, other):
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-5))

plain, model = logits(base()), base()
config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(),
                    task_type="CAUSAL_LM")
estimate_gradients(model, config, lambda: model(input_ids=IDS, labels=IDS).loss.backward())
model = get_peft_model(model, config)
found["gradients then adapter"] = same(logits(model), plain) and bool(
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.any())
model.save_pretrained(here / "init")
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.add_(0.1)
y = logits(model)
model.peft_config["default"].init_lora_weights = True
model.save_pretrained(here / "plain", path_initial_model_for_weight_conversion=str(here / "init"))
found["plain LoRA on the pristine base"] = same(logits(PeftModel.from_pretrained(base(), here / "plain")), y)
found["conversion"] = model.supports_lora_conversion() and model.base_model.supports_lora_conversion("default")
found["settings"] = model.base_model.get_model_config(model.base_model.model)["model_type"] == "llama"
found["from_peft_type"] = peft.PeftConfig.from_peft_type(peft_type="LORA", r=5).r == 5
found["usual layers"] = "llama" in peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
again = base()
again.save_pretrained(here / "base")
loaded = peft.AutoPeftModelForCausalLM
kinds = peft.PeftType
found["kinds"] = config.peft_type == kinds.LORA and config.peft_type != kinds.PREFIX_TUNING
found["kind as a key"] = peft.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type] is type(model.base_model)
found["kind as a setting"] = LoraConfig(peft_type=kinds.LORA).peft_type == kinds("LORA")
found["auto"] = loaded is AutoPeftModelForCausalLM
say(found)
"""

INNER = """
import sys, warnings
from pathlib import Path
import torch
from safetensors.torch import load_file
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as convert
from toys.language_models import IDS, llama, logits, mixtral

here, found = Path(sys.argv[1]), {}

def base(make=llama):
    torch.manual_seed(0)
    return make().eval()

def same(one, other):
    return bool(torch.allclose(one, other, rtol=1e-4, atol=1e-5))

plain = logits(base())
config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
model = get_peft_model(base(), config).eval()
y = logits(model)

# a file of an older PEFT
model.save_pretrained(here / "adapter")
torch.save(load_file(here / "adapter" / "adapter_model.safetensors"), here / "adapter" / "adapter_model.bin")
(here / "adapter" / "adapter_model.safetensors").unlink()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found["a pickle"] = same(logits(PeftModel.from_pretrained(base(), here / "adapter")), y)
    found["its tensors"] = load_peft_weights(here / "adapter").keys() == get_peft_model_state_dict(model).keys()
said = [str(w.message) for w in caught]
found["said"] = [text for text in said if "is a pickle" in text]

# a hostile one
class Runs:
    def __reduce__(self):
        return (open, (str(here / "ran"), "w"))
torch.save({"base_model.model.x.lora_A.weight": Runs()}, here / "adapter" / "adapter_model.bin")
try:
    PeftModel.from_pretrained(base(), here / "adapter")
except Exception as error:
    found["a hostile pickle"] = "holds more than tensors" in str(error) and not (here / "ran").exists()

# layers
layer = model.base_model.model.model.layers[0].self_attn.q_proj
found["classes"] = isinstance(layer, Linear) and isinstance(layer, LoraLayer)
weight = layer.get_base_weight()
found["weight"] = same(weight, base().model.layers[0].self_attn.q_proj.weight)
for _, one in model.named_modules():
    if isinstance(one, LoraLayer):
        one.reset_lora_parameters("default", True)
found["drawn anew"] = same(logits(model), plain)
layer.set_base_weight(weight + 1)
found["written"] = not same(logits(model), plain)
layer.set_base_weight(weight)
found["written back"] = same(logits(model), plain)

# the start of one subtracted from another
other = get_peft_model(base(), config).eval()
z = logits(other)
other.load_adapter(here / "init", "init") if (here / "init").exists() else other.add_adapter("init", config)
trained = get_peft_model_state_dict(other)
difference = other.base_model.subtract_mutated_init(trained, "init")
found["ranks"] = {t.shape[0] for k, t in difference.items() if "lora_A" in k} == {4}

# experts of transformers 4, for the model of transformers 5
stacks = get_peft_model(base(mixtral), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
held = get_peft_model_state_dict(stacks)
found["as they are"] = convert(stacks.get_base_model(), stacks.peft_config["default"], held).keys() == held.keys()
single = {}
inner = stacks.get_base_model().config
for at in range(inner.num_hidden_layers):
    for expert in range(inner.num_local_experts):
        for name in ("w1", "w2", "w3"):
            into, out = inner.hidden_size, inner.intermediate_size
            into, out = (out, into) if name == "w2" else (into, out)
            key = f"base_model.model.model.layers.{at}.block_sparse_moe.experts.{expert}.{name}.lora_"
            single[key + "A.weight"], single[key + "B.weight"] = torch.randn(2, into), torch.randn(out, 2)
old = LoraConfig(r=2, target_modules=["w1", "w2", "w3"])
made = convert(stacks.get_base_model(), old, single)
found["stacked"] = len(made) == inner.num_hidden_layers * 4 and all(".experts" in key for key in made)
say(found)
"""


@pytest.mark.slow
def test_documented_calls_work(tmp_path: Path) -> None:
    found = found_by_name(DOCUMENTED, str(tmp_path))
    assert [claim for claim, holds in found.items() if not holds] == []


@pytest.mark.slow
def test_files_and_inner_parts_that_scripts_touch_work(tmp_path: Path) -> None:
    found = found_by_name(INNER, str(tmp_path))
    said = found.pop("said")
    assert len(said) == 2
    assert all("It was read as tensors only. (PEFT does not refuse it" in text for text in said)
    assert [claim for claim, holds in found.items() if not holds] == []


def test_what_is_absent_says_what_to_do() -> None:
    done = by_name("from peft import IA3Config\nIA3Config(target_modules=['k'])")
    assert done.returncode == 1
    assert "NotAvailableError: peft.IA3Config belongs to IA3, which lorafa does not have" in done.stderr
    assert "use a LoraConfig" in done.stderr


# ---- lorafa run


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=env, check=False)


def written(folder: Path, text: str) -> str:
    path = folder / "train.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_script_has_its_arguments_its_folder_and_pefts_name(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 3\n")
    text = "import sys, peft, beside\nprint(__name__, sys.argv[1:], beside.VALUE, peft.__version__)\n"
    for start in (("lorafa", "run"), ("lorafa.compat",)):
        done = run(*start, written(tmp_path, text), "--lr", "1e-4", "--help")
        assert done.stdout == "__main__ ['--lr', '1e-4', '--help'] 3 0.22.0\n", done.stderr
        assert done.returncode == 0


def test_a_script_that_fails_has_its_own_traceback_and_status(tmp_path: Path) -> None:
    script = written(tmp_path, "import peft\n\ndef train():\n    raise ValueError('no data')\n\ntrain()\n")
    done = run("lorafa", "run", script)
    own = subprocess.run([sys.executable, "-c", f"exec(compile(open({script!r}).read(), {script!r}, 'exec'))"],
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == own.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: no data"
    assert f'File "{script}", line 6, in <module>' in done.stderr
    assert "lorafa" not in done.stderr.replace(str(tmp_path), "")
    assert "runpy" not in done.stderr


@pytest.mark.parametrize(("ending", "status"), [("sys.exit(7)", 7), ("sys.exit('bad data')", 1), ("sys.exit()", 0)])
def test_a_script_leaves_with_its_own_status(ending: str, status: int, tmp_path: Path) -> None:
    done = run("lorafa", "run", written(tmp_path, f"import sys\n{ending}\n"))
    assert done.returncode == status
    assert ("bad data" in done.stderr) == ("bad data" in ending)


@pytest.mark.skipif(os.name == "nt", reason="a process ends by a signal on Unix")
def test_a_script_that_is_interrupted_ends_by_the_signal(tmp_path: Path) -> None:
    done = run("lorafa", "run", written(tmp_path, "raise KeyboardInterrupt\n"))
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr


def test_strict_is_handed_to_the_script(tmp_path: Path) -> None:
    script = written(tmp_path, "import sys\nprint([f.lenient for f in sys.meta_path if hasattr(f, 'lenient')])\n")
    assert run("lorafa", "run", script).stdout == "[True]\n"
    assert run("lorafa", "run", "--strict", script).stdout == "[False]\n"
    assert run("lorafa.compat", script, LORAFA_STRICT="1").stdout == "[False]\n"
    assert run("lorafa.compat", script, LORAFA_STRICT="0").stdout == "[True]\n"


@pytest.mark.parametrize("start", [("lorafa", "run"), ("lorafa.compat",)], ids=["command", "module"])
def test_a_script_that_is_not_there_is_named(start: Any, tmp_path: Path) -> None:
    done = run(*start, str(tmp_path / "no.py"))
    assert done.returncode == 2
    assert f"There is no script {tmp_path / 'no.py'}. Give the path of a Python file." in done.stderr.replace("\n", " ")
    done = run(*start, str(tmp_path))
    assert done.returncode == 2
    assert "is a folder without a __main__.py" in " ".join(done.stderr.split())


def test_the_module_without_a_script_says_how_it_is_called() -> None:
    done = run("lorafa.compat")
    assert done.returncode == 2
    assert "usage: python -m lorafa.compat script.py" in done.stderr
