"""The README.md of a saved adapter, in the form the Hub reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError, first_line
from lorafa.storage.whole import make_folder, written_whole

README = "README.md"


def card_of(config: LoraConfig) -> str:
    """The text of a model card."""
    base = config.base_model_name_or_path
    head = ["---", *([f"base_model: {_yaml(base)}"] if base else []), "library_name: peft", "tags:", "- lora", "---"]
    body = [
        "",
        "# LoRA adapter",
        "",
        f"A low-rank adapter (rank {config.r}) for `{_shown(base) if base else 'its base model'}`, in PEFT's format.",
        "",
        "```python",
        "from lorafa import PeftModel",
        "",
        "model = PeftModel.from_pretrained(base_model, this_folder)",
        "```",
        "",
    ]
    return "\n".join(head + body)


def _yaml(text: str) -> str:
    """A text as a value of yaml: bare where that is one, else in quotes, so that it adds nothing to the head."""
    bare = re.fullmatch(r"[A-Za-z/][\w./-]*", text, re.ASCII) and len(text) > 5
    return text if bare else json.dumps(text)


def _shown(text: str) -> str:
    """The text on one line, without what would end the span of code it stands in."""
    return "".join(letter if letter.isprintable() and letter != "`" else "?" for letter in text)


def update_card(directory: str | Path, config: LoraConfig) -> None:
    """Write a model card, or enter base model, library and tags in the head of the README.md that the folder has.

    Its text stays, and so do entries it has already.

    Raises:
        CheckpointError: its head is not YAML, it cannot be written, or the package that reads it is not installed.
    """
    path = make_folder(directory) / README
    if not path.exists():
        with written_whole(path) as temporary:
            temporary.write_text(card_of(config), encoding="utf-8")
        return
    try:
        from huggingface_hub import ModelCard
    except ImportError as error:
        raise CheckpointError(
            f"Reading the head of {path} needs a package that is not installed. Run: pip install huggingface_hub"
        ) from error
    try:
        card: Any = ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # of YAML and of the Hub's own checks
        raise CheckpointError(f"The head of {path} cannot be read: {first_line(error)}. Mend or delete it.") from error
    card.data.base_model = card.data.base_model or config.base_model_name_or_path
    card.data.library_name = card.data.library_name or "peft"
    tags = list(card.data.tags or ())
    card.data.tags = tags if "lora" in tags else [*tags, "lora"]
    with written_whole(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
