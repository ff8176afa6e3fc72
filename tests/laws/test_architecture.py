"""The tree of the house: imports go down only, files stay short, and importing the package stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lorafa
from lorafa.backends import BACKENDS
from lorafa.backends.parameter import ParameterBackend
from lorafa.initializers import INITIALIZERS
from lorafa.layers import LAYERS
from lorafa.layers.saved import ModulesToSaveWrapper
from lorafa.layers.tied import TiedAdapter
from lorafa.layers.tokens import TrainableTokensWrapper
from lorafa.variants import VARIANTS
from toys.places import ROOT

PACKAGE = ROOT / "src" / "lorafa"
FILES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("src", "tests", "benchmarks", "recipes")
ALL_FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
MAX_LINES = 400
LONGER = {
    "src/lorafa/adapter.py": "the three words of the mathematics on one page",
    "src/lorafa/config.py": "the fields of LoraConfig with their checks beside them",
    "src/lorafa/layers/base.py": "what every kind of layer answers to, under PEFT's names",
    "src/lorafa/models/head_loss.py": "the loss, the cut before the head, and the trial that compares both",
    "tests/unit/numerics/test_fused.py": "one formula in every dtype and transformation",
}
"""Files that are longer, and the one subject each of them has."""

LEVELS = (
    ("errors", "version"),
    ("mixed_model",),
    ("numerics", "spec", "registry", "context", "settings", "processes", "launch"),
    ("backends", "storage"),
    ("adapter",),
    ("data", "layers", "models", "optimizers", "calibration", "evals"),
    ("initializers",),
    ("variants",),
    ("config",),
    ("surgery",),
    ("io",),
    ("peft_model",),
    ("alignment",),
    ("auto", "arrow_model", "starts", "counterparts"),
    ("train", "costs", "inspection", "compat"),
    ("conf",),
    ("runs",),
    ("export", "report", "chat", "diagnosis"),
    ("cli",),
    ("scripts",),
)
"""Folders and files at the top of the package, from the bottom up: imports go to the same line or one above it."""
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
HEAVY = {
    *("transformers", "tokenizers", "datasets", "accelerate", "hydra", "omegaconf"),
    *("matplotlib", "jinja2", "bitsandbytes", "torchao", "gguf", "peft"),
}


def _top(module: str) -> str:
    """``lorafa.data.chat`` -> ``data``; the package itself -> an empty text."""
    return module.partition(".")[2].partition(".")[0]


def _module(path: Path) -> str:
    return ".".join(("lorafa", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {_module(path): path for path in FILES}


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of the package, those inside functions and those for types included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            if node.module and node.module.partition(".")[0] == "lorafa":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield node.lineno, inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "lorafa")


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_level() -> None:
    names = {_name(path) for path in FILES} - {"__init__", "__main__"}
    assert names == LEVEL_OF.keys(), "give the new module its place in LEVELS"


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports files of tests by their bare names, and collects only the first of two."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_files_sort_topologically_imports_for_types_included() -> None:
    graph = {
        name: {
            module
            for _, module in _imports(path)
            if module != name and not (MODULES[module].name == "__init__.py" and name.startswith(f"{module}."))
        }
        for name, path in MODULES.items()
        if name != "lorafa"  # loads its names when they are asked for
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


def test_imports_go_down_only() -> None:
    upward = [
        f"{path.relative_to(ROOT)}, line {line}: {module}"
        for path in FILES
        for line, module in _imports(path)
        # the package's __init__ stands above all
        if LEVEL_OF.get(_top(module), len(LEVELS) if module == "lorafa" else 0) > LEVEL_OF.get(_name(path), len(LEVELS))
    ]
    assert upward == []


def test_a_file_has_one_subject_or_is_short() -> None:
    long = [path for path in ALL_FILES if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES]
    assert {str(path.relative_to(ROOT)) for path in long} == set(LONGER)


# ---- what others need to know of a case is a fact or a method of its class: nobody asks which case it is


def _homes(cases: Iterable[tuple[str, object]]) -> dict[str, set[str]]:
    """Name -> the files of the cases that are called so: a start and its variant may be."""
    homes: dict[str, set[str]] = defaultdict(set)
    for name, case in cases:
        homes[name].add(str(MODULES[str(case.__module__)].relative_to(PACKAGE)))
    return dict(homes)


_ENTRIES = [(name, table.get(name)) for table in (VARIANTS, LAYERS, INITIALIZERS) for name in table.names()]
_TYPES = [table.get(name) for table in (VARIANTS, LAYERS, BACKENDS) for name in table.names()]
_TYPES += [ModulesToSaveWrapper, TrainableTokensWrapper, TiedAdapter, ParameterBackend]
NAMES = _homes(_ENTRIES) | _homes((case.__name__, case) for case in _TYPES)
"""Names of variants, starts and kinds of layer, and the classes of these, of wrappers and of back ends."""
REGISTRIES = {"variants/__init__.py", "initializers/__init__.py", "layers/__init__.py", "backends/__init__.py"}
ASKED_ELSEWHERE = {
    ("surgery/auxiliary.py", "ModulesToSaveWrapper"): "it plans and makes these two, and keeps them off each other",
    ("surgery/auxiliary.py", "TrainableTokensWrapper"): "as the line before",
    ("starts/eva.py", "eva"): "EVA's own functions, as PEFT calls them",
    ("starts/preprocess.py", "corda"): "one function is CorDA's own, as PEFT calls it",
    ("io/layouts/mlx.py", "dora"): "no formula, but MLX's word in its configs",
    ("io/card.py", "lora"): "no formula, but a tag of model cards",
    ("runs/formats.py", "lora_ga"): "what earlier versions have written under that name",
    ("train/steady.py", "random"): "no start, but transformers' name of an order of rows",
    ("initializers/lora_ga.py", "random"): "no start, but one of LoRA-GA's directions",
    ("layers/asked.py", "gaussian"): "no start of an adapter, but how PEFT's method draws factors anew",
    ("scripts/translate.py", "gaussian"): "no start, but how the published scripts draw a factor",
    ("scripts/translate.py", "kaiming"): "as the line before",
}
"""(file, name) of a case that is asked for by its name outside its own file -> why."""


def _asked_for(tree: ast.Module) -> Iterator[str]:
    """Texts that something is compared with, begins with or is looked up by, and classes that something may be."""
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            said: list[ast.expr] = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            said = [node.value]
        elif isinstance(node, ast.MatchClass):
            said = [node.cls]
        elif isinstance(node, ast.Dict):
            said = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            said = node.args[1:] if node.func.id in ("isinstance", "issubclass") else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            said = node.args if node.func.attr in ("startswith", "endswith") else []
        else:
            continue
        words = [word for one in said for word in _words(one, constants)]
        if not isinstance(node, ast.Dict) or NAMES.keys() >= set(words):  # a table of cases and of nothing else
            yield from words


def _words(said: ast.expr, constants: dict[str, ast.expr]) -> Iterator[str]:
    """The texts in an expression, and the names in it that may be classes; constants of the file are looked up."""
    if isinstance(said, ast.Constant) and isinstance(said.value, str):
        yield said.value
    elif isinstance(said, ast.Name) and said.id in constants:
        yield from _words(constants[said.id], {})
    elif isinstance(said, (ast.Name, ast.Attribute)):
        name = said.id if isinstance(said, ast.Name) else said.attr
        yield from [name] if name[:1].isupper() else []
    elif isinstance(said, (ast.Tuple, ast.List, ast.Set)):
        yield from (word for one in said.elts for word in _words(one, constants))
    elif isinstance(said, ast.BinOp):
        yield from (*_words(said.left, constants), *_words(said.right, constants))


def _ladders(path: Path) -> set[tuple[str, str]]:
    """(file, name) of every case that the file asks for, unless it is the case's own."""
    file = str(path.relative_to(PACKAGE))
    asked = set(_asked_for(ast.parse(path.read_text(encoding="utf-8")))) & NAMES.keys()
    return {(file, name) for name in asked if file not in NAMES[name] | REGISTRIES}


def test_no_case_is_asked_for_by_its_name_outside_its_own_file() -> None:
    assert set().union(*map(_ladders, FILES)) == ASKED_ELSEWHERE.keys()


@pytest.mark.parametrize(
    "text",
    [
        "x.kind == 'linear'",
        "KINDS = ('embedding', 'conv')\nx in KINDS",
        "isinstance(x, layers.LoraExperts | int)",
        "type(x) is TiedAdapter",
        "KNOWN = {'attention': 1, 'experts': 2}",
        "x.startswith('pissa')",
        "match x:\n    case 'dora': pass",
    ],
)
def test_a_ladder_is_found(text: str) -> None:
    assert set(_asked_for(ast.parse(text))) & NAMES.keys()


def _documented(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring, those under a field or a constant included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value.strip()


def test_no_docstring_leaves_its_noun_to_be_guessed() -> None:
    found = [
        f"{path.relative_to(ROOT)}, line {line}: {text[:60]}"
        for path in FILES
        for line, text in _documented(ast.parse(path.read_text(encoding="utf-8")))
        if text.startswith(("Of ", "Those ", "Those,", "That of ", "Theirs"))
    ]
    assert found == []


def _loaded_by(statement: str) -> set[str]:
    """Names of the modules a fresh interpreter has loaded after the statement, packages before their modules."""
    code = f"import sys; {statement}; print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def _loaded_by_command(*arguments: str) -> set[str]:
    run = f"from lorafa.cli.main import main\ntry: main({list(arguments)!r})\nexcept SystemExit: pass"
    return _loaded_by(f"exec({run!r})")


def test_importing_the_package_loads_nothing_but_python_s_own_modules() -> None:
    assert _loaded_by("import lorafa") & (HEAVY | {"torch", "numpy", "safetensors", "yaml", "rich"}) == set()


def test_the_public_names_load_torch_and_nothing_of_the_training_stack() -> None:
    loaded = _loaded_by("import lorafa; [getattr(lorafa, name) for name in lorafa.__all__]")
    assert "torch" in loaded
    assert loaded & (HEAVY | {"yaml", "rich", "torch._dynamo"}) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["--version"], ["nope"], ["doctor", "--quick"]),
        *([name, "--help"] for name in ("params", "report", "inspect", "export")),
    ],
)
def test_what_runs_nothing_loads_no_package(arguments: list[str]) -> None:
    assert _loaded_by_command(*arguments) & (HEAVY | {"torch", "numpy", "yaml", "rich"}) == set()


def test_help_with_all_settings_loads_what_reads_settings_and_nothing_that_computes() -> None:
    loaded = _loaded_by_command("train", "--help")
    assert "hydra" in loaded
    assert loaded & ((HEAVY - {"hydra", "omegaconf"}) | {"torch", "numpy"}) == set()


def test_a_report_loads_what_draws_and_nothing_that_computes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("peft: {r: 8}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}')
    loaded = _loaded_by_command("report", str(tmp_path))
    assert (tmp_path / "report.html").is_file()
    assert loaded & ((HEAVY - {"matplotlib", "jinja2"}) | {"torch"}) == set()


def test_counting_parameters_loads_the_class_of_the_model_and_nothing_that_trains() -> None:
    loaded = _loaded_by_command("params", "model=opt-125m")
    assert "transformers.models.opt.modeling_opt" in loaded
    unused = {"transformers.trainer", "transformers.models.llama.modeling_llama", "datasets", "lorafa.models.head_loss"}
    assert loaded & unused == set()


def test_names_are_listed_where_they_are_loaded_from_exported_and_declared_to_type_checkers() -> None:
    homes = lorafa._HOMES
    assert list(homes) == sorted(homes)
    assert sorted([*homes, "__version__"]) == sorted(lorafa.__all__)
    assert set(lorafa.__all__) <= set(dir(lorafa))
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    declared = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in declared.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == homes


def test_a_name_that_is_not_there_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'lorafa' has no attribute 'LoraConfg'"):
        lorafa.LoraConfg  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'LoraConfg'"):
        exec("from lorafa import LoraConfg")


def test_public_modules_come_with_the_package() -> None:
    assert lorafa.optimizers.create_lorafa_optimizer is lorafa.create_lorafa_optimizer
    assert lorafa.errors.LoraError is lorafa.LoraError
