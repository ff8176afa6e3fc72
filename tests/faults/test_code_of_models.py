"""Code that comes with a model is run on nobody's prompt: transformers is told each time that it is not trusted."""

from __future__ import annotations

import ast

from toys.places import ROOT


def test_every_loading_from_transformers_says_whether_code_is_trusted() -> None:
    silent, said = [], 0
    for path in sorted((ROOT / "src" / "lorafa").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value).rpartition(".")[2]
                of_models = owner.startswith("Auto") or "auto_class" in owner or owner == "found"
                if node.func.attr in ("from_pretrained", "from_config") and of_models:
                    trusted = {word.arg for word in node.keywords} & {"trust_remote_code", None}
                    said += bool(trusted)
                    silent += [] if trusted else [f"{path.name}:{node.lineno}"]
    assert silent == []
    assert said >= 9
