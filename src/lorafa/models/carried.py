"""The files of a model beside its weights: config, generation config, tokenizer, chat template, licence."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafa.errors import SourceError
from lorafa.storage.base_weights import INDEX, WHOLE, shards
from lorafa.storage.hub import HubOptions, locate
from lorafa.storage.paths import user_path
from lorafa.storage.whole import read_json

CONFIG = "config.json"
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"),
    *("source.spm", "target.spm", "tekken.json", "normalizer.json", "chat_template.jinja", "chat_template.json"),
)
"""Files of tokenizers of transformers."""
OTHERS = (
    *("generation_config.json", "preprocessor_config.json", "processor_config.json", "image_processor_config.json"),
    *("video_preprocessor_config.json", "audio_tokenizer_config.json", "modules.json", "LICENSE", "LICENSE.txt"),
    *("LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md"),
)
"""Other files that belong to a model whatever its weights are. A model card does not: it speaks of the base alone."""


_IN_BOTH = ("tie_word_embeddings",)
"""Settings that transformers reads in the config of a model and in that of its text model."""


def fetched(model: str, revision: str | None, hub: HubOptions) -> Path:
    """The folder with the files of a Hub model, fetched where they are not in the local cache.

    Raises:
        SourceError: the model cannot be found or fetched, or has no safetensors files.
    """
    options: HubOptions = {**hub, "revision": revision or hub.get("revision")}
    folder = locate(model, [CONFIG], **options).parent
    first = locate(model, [WHOLE, INDEX], **options)
    if first.suffix == ".json":
        listed = read_json(first).get("weight_map")
        for shard in sorted(set(listed.values())) if isinstance(listed, dict) else ():
            locate(model, [str(shard)], **options)
        shards(first)
    for name in (*TOKENIZER, *OTHERS):
        try:
            locate(model, [name], **options)
        except SourceError:
            continue
    return folder


def fetch_beside(adapter: str | Path, hub: HubOptions) -> None:
    """Fetch what may lie beside an adapter on the Hub: its tokenizer, and the classes of a head it has trained."""
    if user_path(adapter).is_dir():
        return
    from lorafa.data.classes import CLASSES_NAME  # which brings rich

    wanted = [CLASSES_NAME, "tokenizer_config.json"]
    for name in wanted:
        try:
            locate(adapter, [name], **hub)
        except SourceError:
            continue
        if name == "tokenizer_config.json":
            wanted += [each for each in TOKENIZER if each != name]


def carried(base: Path, adapters: Sequence[Path]) -> Iterator[Path]:
    """The files that go with the merged model as they are; a tokenizer beside an adapter knows what was added to it."""
    with_tokenizer = [folder for folder in adapters if (folder / "tokenizer_config.json").is_file()]
    for name in TOKENIZER:
        if (path := (with_tokenizer[-1] if with_tokenizer else base) / name).is_file():
            yield path
    for name in OTHERS:
        if (path := base / name).is_file():
            yield path
    if "auto_map" in read_config(base):  # code that others may let run; here it is never run
        yield from sorted(base.glob("*.py"))
    extra = base / "additional_chat_templates"
    if extra.is_dir() and not with_tokenizer:
        yield extra


def carry(paths: Iterator[Path], folder: Path) -> None:
    """Copy files, and folders of files, into a folder."""
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def with_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The json of a config with settings changed.

    One that stands in the config of its text model alone is changed there, one that stands in both in both; whether
    weights are tied is said in both, since transformers asks either.
    """
    new = dict(config)
    texts = ("text_config", "llm_config", "language_config")
    inner = next((key for key in texts if isinstance(config.get(key), dict)), None)
    for key, value in settings.items():
        inside = inner is not None and (key in config[inner] or key in _IN_BOTH)
        if inside:
            new[inner] = {**new[inner], key: value}  # type: ignore[index]
        if not inside or key in config or key in _IN_BOTH:
            new[key] = value
    return new


def read_config(folder: Path) -> dict[str, Any]:
    """The json of a model's config.

    Raises:
        SourceError: there is none.
        CheckpointError: it is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise SourceError(f"The folder {str(folder)!r} holds no {CONFIG}, so it is not a model.")
    return read_json(folder / CONFIG)
