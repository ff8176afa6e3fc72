"""Ollama, which runs llama.cpp: the adapter as GGUF, and a Modelfile that names it and its base (docs/modelfile.mdx).

The base is the same model in Ollama's form: what ``FROM`` names is a model of its library, a GGUF file, or a folder of
transformers. TEMPLATE and SYSTEM are left to that model: they are written in another language than chat templates.
"""

from __future__ import annotations

from pathlib import Path

from lorafa.errors import CheckpointError
from lorafa.export.base import BaseFacts
from lorafa.export.gguf import FILE_NAME, GGUFExporter
from lorafa.export.update import PlainAdapter
from lorafa.storage.whole import written_whole

MODELFILE = "Modelfile"
IMPORTED = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM"}
)
"""Architectures that it imports from a folder of transformers."""


class OllamaExporter(GGUFExporter):
    """GGUF and a Modelfile beside it."""

    words = "Ollama"
    takes_merged = True

    def write(self, adapter: PlainAdapter, folder: Path, base: BaseFacts | None) -> list[str]:
        assert base is not None
        super().write(adapter, folder, base)
        notes = []
        model = base.name
        if Path(base.name).is_dir():
            model = str(Path(base.name).resolve())
            if base.architecture not in IMPORTED:
                notes.append(
                    f"Ollama imports no folder of {base.architecture}: name its GGUF file or a model of its library "
                    f"after FROM in the {MODELFILE}."
                )
        else:
            notes.append(
                f"FROM in the {MODELFILE} is the Hub's name of the base: put there what Ollama calls the same model, "
                "unquantized or not, or the path of its GGUF file."
            )
        _write(folder / MODELFILE, f"FROM {model}\nADAPTER ./{FILE_NAME}\n")
        return [*notes, f"Make a model of it: ollama create <name> -f {MODELFILE}"]

    def beside_merged(self, folder: Path, base: BaseFacts | None) -> list[str]:
        assert base is not None
        if base.architecture not in IMPORTED:
            raise CheckpointError(
                f"Ollama imports no folder of {base.architecture or 'that architecture'}, only of "
                f"{', '.join(sorted(IMPORTED))}. Make GGUF of a merged model with llama.cpp's convert_hf_to_gguf.py: "
                "export it with --for peft --merged. Nothing was written."
            )
        _write(folder / MODELFILE, "FROM .\n")
        return [f"Make a model of it: ollama create <name> -f {MODELFILE}"]


def _write(path: Path, text: str) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


OLLAMA = OllamaExporter()
