"""The README.md of a saved adapter, in the form the Hub reads."""

from __future__ import annotations

from pathlib import Path

from lorafa.config import LoraConfig
from lorafa.storage import written_whole


def write_card(directory: str | Path, config: LoraConfig) -> None:
    """Write a model card unless the folder has a README.md already."""
    path = Path(directory) / "README.md"
    if path.exists():
        return
    base = config.base_model_name_or_path
    head = ["---", *([f"base_model: {base}"] if base else []), "library_name: peft", "tags:", "- lora", "---"]
    body = [
        "",
        "# LoRA adapter",
        "",
        f"A low-rank adapter (rank {config.r}) for `{base or 'its base model'}`, in PEFT's format.",
        "",
        "```python",
        "from lorafa import PeftModel",
        "",
        "model = PeftModel.from_pretrained(base_model, this_folder)",
        "```",
        "",
    ]
    with written_whole(path) as temporary:
        temporary.write_text("\n".join(head + body), encoding="utf-8")
