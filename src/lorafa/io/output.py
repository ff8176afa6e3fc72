"""What the files of a merged model hold: planned name by name from shapes alone, then made part by part."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafa.errors import AdapterError, CheckpointError, shorten
from lorafa.io.attached import Attached
from lorafa.io.changes import Change
from lorafa.io.skeleton import empty_model, tensors_of
from lorafa.models.carried import with_settings
from lorafa.models.checkpoint_names import Group, stored_name
from lorafa.numerics.linalg import all_finite
from lorafa.storage.base_weights import WHOLE
from lorafa.storage.model_files import Stored
from lorafa.storage.model_writer import ModelWriter, Planned, PlannedFile, arranged, in_shards
from lorafa.surgery.untied import can_be_untied


@dataclass(frozen=True)
class Part:
    """Tensors that are made together: the least that some changes and the conversions of a checkpoint allow."""

    changes: tuple[Change, ...]
    groups: tuple[Group, ...]
    new: Mapping[str, str]
    """Name in the checkpoint -> name in the model, of tensors the base does not hold."""

    @property
    def stored(self) -> list[str]:
        return [*(name for group in self.groups for name in group.stored), *self.new]


class Output:
    """The files that are to be written, and how each tensor in them comes about."""

    def __init__(self, on_base: Attached, dtype: torch.dtype | None, most: int | None) -> None:
        """Plan the files of a merged model.

        Args:
            dtype: of floating-point weights; None: each as it is in the base.
            most: bytes of a file; None: the files of the base.

        Raises:
            CheckpointError: no config of the model could say what is tied to what after merging, or a tensor would be
                lost.
        """
        self._skeleton, self._names = on_base.skeleton, on_base.names
        self._dtype = dtype
        self._source_of = _representatives(on_base.changes)
        own = self._skeleton.ties
        self.untied = any(len(names) > 1 and not self._are_equal(names) for names in dict.fromkeys(own.values()))
        """Whether tensors that are one in the base are several here."""
        if self.untied and not can_be_untied(on_base.kind, on_base.config):
            self._require_equal(own.values(), on_base.kind)
        self.settings = _settings_of_sizes(on_base) | ({"tie_word_embeddings": False} if self.untied else {})
        """What the config says otherwise than that of the base."""
        final: Mapping[str, Hashable] = {name: names[0] for name, names in own.items()}
        if self.settings:
            final = self._described(on_base, with_settings(on_base.stored_config, self.settings))
        if dtype is not None:
            key = "torch_dtype" if "torch_dtype" in on_base.stored_config else "dtype"
            self.settings[key] = str(dtype).removeprefix("torch.")
        same_class = type(self._skeleton.model).__name__ in (on_base.config.architectures or ())
        if not same_class:
            self.settings["architectures"] = [type(self._skeleton.model).__name__]
        self.dropped = () if same_class else self._skeleton.names.unused
        """Tensors of the base that are left out."""
        self._parts, planned = self._planned(final)
        self.changed = sum(tensor.copied is None for tensor in planned.values())
        """How many tensors are not those of the base."""
        self.files = self._filed(planned, most)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for file in self.files for tensor in file.tensors)

    # ---- what is tied to what

    def _described(self, on_base: Attached, written: dict[str, Any]) -> dict[str, Hashable]:
        """Each tensor of the model that the json of a config describes, equal for those that it ties.

        Raises:
            CheckpointError: that model would have other shapes, or tie what merging has made different.
        """
        model = empty_model(on_base.kind, type(on_base.config).from_dict(written))
        tensors, like = tensors_of(model), self._skeleton.like
        if other := [name for name, tensor in tensors.items() if name not in like or like[name].shape != tensor.shape]:
            raise CheckpointError(
                f"The config of the base has no way to say what {shorten(other, 3)} would be after merging. Merge in "
                "memory: load the model, merge_and_unload, save_pretrained. Nothing was written."
            )
        aliases: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            aliases.setdefault(id(tensor), []).append(name)
        self._require_equal(aliases.values(), on_base.kind)
        return {name: names[0] for names in aliases.values() for name in names}

    def _require_equal(self, groups: Iterable[Sequence[str]], kind: type[nn.Module]) -> None:
        """Raises CheckpointError for names of one tensor that merging has made several."""
        for names in groups:
            if len(names) > 1 and not self._are_equal(names):
                raise CheckpointError(
                    f"A {kind.__name__} always shares one weight among {shorten(names, 4)}, and merging would "
                    "give them different ones, of which all but one would be lost. Train the adapter with "
                    "ensure_weight_tying=True, or keep it beside the model. Nothing was written."
                )

    def _are_equal(self, names: Sequence[str]) -> bool:
        """Whether tensors that are one in the base are one after merging."""
        sources = {self._source_of[name][0] if name in self._source_of else None for name in names}
        if len(sources) == 1:
            return True
        first, *others = (self._value(name) for name in names)
        return all(torch.equal(first, other) for other in others)

    def _value(self, name: str) -> Tensor:
        if name not in self._source_of:
            return self._skeleton.value(name)
        _, change, at = self._source_of[name]
        return change.values(self._skeleton, self._names)[at]

    # ---- what is written

    def _planned(self, final: Mapping[str, Hashable]) -> tuple[list[Part], dict[str, Planned]]:
        skeleton, stored = self._skeleton, self._skeleton.files.tensors
        touched = [group for group in skeleton.names.groups if any(name in self._source_of for name in group.names)]
        new, copies = self._new_tensors(final)
        parts = _parts(self._source_of, touched, new)
        made = {name for part in parts for name in part.stored}
        planned: dict[str, Planned] = {}
        dropped = set(self.dropped)
        for name, tensor in stored.items():
            if name in dropped:
                continue
            out = self._out(tensor.dtype)
            shape = tensor.shape
            if name in made and (group := _by_stored(touched)[name]).conversion is None:
                shape = tuple(skeleton.like[group.names[0]].shape)
            as_it_is = name not in made and out == tensor.dtype
            planned[name] = Planned(name, out, shape, tensor if as_it_is else None)
        for name, inner in new.items():
            like = skeleton.like[inner]
            planned[name] = Planned(name, self._out(self._stored_dtype(inner)), tuple(like.shape))
        for name, source in copies.items():
            out = self._out(source.dtype)
            planned[name] = Planned(name, out, source.shape, source if out == source.dtype else None)
        cast = [name for name, tensor in planned.items() if tensor.copied is None and name not in made]
        self._cast = {name: copies.get(name) or stored[name] for name in cast}
        return parts, planned

    def _new_tensors(self, final: Mapping[str, Hashable]) -> tuple[dict[str, str], dict[str, Stored]]:
        """Tensors that the base does not hold by name: those that are made, and those that are another's bytes."""
        skeleton, model = self._skeleton, self._skeleton.model
        new: dict[str, str] = {}
        copies: dict[str, Stored] = {}
        have = {one for name, one in final.items() if name in skeleton.by_name}
        for name, one in final.items():
            if name in skeleton.by_name or one in have:
                continue
            have.add(one)
            group = skeleton.group_of(name)
            if name in self._source_of:
                new[stored_name(model, name)] = name
            elif group is not None and group.conversion is None:
                copies[stored_name(model, name)] = skeleton.files.tensors[group.stored[0]]
            elif group is not None:
                raise CheckpointError(f"The files of the base have no tensor that {name!r} could be copied from.")
        return new, copies

    def _stored_dtype(self, name: str) -> torch.dtype:
        """The dtype of the base for a tensor that it does not hold by that name."""
        group = self._skeleton.group_of(name)
        if group is not None:
            return self._skeleton.files.tensors[group.stored[0]].dtype
        like = self._skeleton.like[name]
        return self._main_dtype() if like.is_floating_point() else like.dtype

    def _main_dtype(self) -> torch.dtype:
        sizes: dict[torch.dtype, int] = {}
        for tensor in self._skeleton.files.tensors.values():
            if tensor.dtype.is_floating_point:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def _out(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 else dtype

    def _filed(self, planned: Mapping[str, Planned], most: int | None) -> list[PlannedFile]:
        files = self._skeleton.files
        if most is not None:
            texts = next(iter(files.metadata.values()))
            return in_shards(planned.values(), most, texts)
        home = {name: files.tensors[name].file.name for name in planned if name in files.tensors}
        held: dict[str, list[Planned]] = {name: [] for name in files.files}
        for name, tensor in planned.items():
            held[home.get(name, files.files[-1])].append(tensor)
        kept = {name: tensors for name, tensors in held.items() if tensors or name == WHOLE}
        return [arranged(name, tensors, files.metadata[name]) for name, tensors in kept.items()]

    # ---- writing

    def write(self, writer: ModelWriter) -> None:
        """Write all of it, in the order of the files.

        Raises:
            AdapterError: a weight would not be finite once rounded.
        """
        part_of = {name: part for part in self._parts for name in part.stored}
        written: set[str] = set()
        for file in self.files:
            for tensor in file.tensors:
                if tensor.name in written:
                    continue
                if tensor.copied is not None:
                    writer.copy(tensor.name)
                elif tensor.name in self._cast:
                    writer.put(tensor.name, self._rounded(tensor.name, self._cast[tensor.name].read(), tensor.dtype))
                else:
                    written |= self._write_part(writer, part_of[tensor.name])

    def _write_part(self, writer: ModelWriter, part: Part) -> set[str]:
        skeleton, dtypes = self._skeleton, {t.name: t.dtype for file in self.files for t in file.tensors}
        made: dict[str, Tensor] = {}
        for change in part.changes:
            made |= change.values(skeleton, self._names)
        skeleton.forget()

        def value(name: str) -> Tensor:
            return made[self._source_of[name][2]] if name in self._source_of else skeleton.value(name)

        for group in part.groups:
            back = group.to_stored({name: value(name) for name in group.names}, skeleton.model)
            for name, tensor in back.items():
                writer.put(name, self._rounded(name, tensor, dtypes[name]))
        for name, inner in part.new.items():
            writer.put(name, self._rounded(name, value(inner), dtypes[name]))
        skeleton.forget()
        return set(part.stored)

    def _rounded(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype:
            return tensor
        rounded = tensor.to(dtype)
        if not all_finite(rounded) and all_finite(tensor):
            raise AdapterError(
                f"{name!r} gives inf once rounded to {str(dtype).removeprefix('torch.')}. Choose a dtype of wider "
                "range: bfloat16 or float32."
            )
        return rounded


def _representatives(changes: Iterable[Change]) -> dict[str, tuple[Hashable, Change, str]]:
    """Name in the model -> (what its values come from, the change that makes them, their name in that change)."""
    first: dict[Hashable, tuple[Change, str]] = {}
    found: dict[str, tuple[Hashable, Change, str]] = {}
    for change in changes:
        for name, source in change.sources().items():
            made_by, at = first.setdefault(source, (change, name))
            found[name] = source, made_by, at
    return found


def _by_stored(groups: Iterable[Group]) -> dict[str, Group]:
    return {name: group for group in groups for name in group.stored}


def _parts(
    source_of: Mapping[str, tuple[Hashable, Change, str]], groups: Sequence[Group], new: Mapping[str, str]
) -> list[Part]:
    """Put together what has to be made together."""
    parent: dict[int, int] = {}

    def root(of: int) -> int:
        while parent.setdefault(of, of) != of:
            of = parent[of]
        return of

    by_id = {id(change): change for _, change, _ in source_of.values()}
    for group in groups:
        ids = [id(source_of[name][1]) for name in group.names if name in source_of]
        for other in ids[1:]:
            parent[root(other)] = root(ids[0])
    found: dict[int, tuple[list[Change], list[Group], dict[str, str]]] = {}
    for key, change in by_id.items():
        found.setdefault(root(key), ([], [], {}))[0].append(change)
    for group in groups:
        owner = next(id(source_of[name][1]) for name in group.names if name in source_of)
        found[root(owner)][1].append(group)
    for name, inner in new.items():
        found[root(id(source_of[inner][1]))][2][name] = inner
    return [Part(tuple(changes), tuple(held), own) for changes, held, own in found.values()]


def _settings_of_sizes(on_base: Attached) -> dict[str, Any]:
    """The vocabulary and the classes, where they are not those of the base's config."""
    now, before, settings = on_base.config, on_base.stored_config, dict[str, Any]()
    text = now.get_text_config()
    inner = before.get("text_config") if isinstance(before.get("text_config"), dict) else {}
    size = getattr(text, "vocab_size", None)
    known = (inner or {}).get("vocab_size", before.get("vocab_size"))
    if size is not None and known is not None and size != known:
        settings["vocab_size"] = size
    labels = {str(number): name for number, name in (getattr(now, "id2label", None) or {}).items()}
    usual = {str(number): f"LABEL_{number}" for number in range(2)}
    if labels != (before.get("id2label") or usual):
        settings |= {"id2label": labels, "label2id": {name: int(number) for number, name in labels.items()}}
    return settings
