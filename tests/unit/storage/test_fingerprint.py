"""The fingerprint tells whether an adapter meets the weights it was made for, in whatever type they are loaded."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from lorafa.errors import CheckpointError
from lorafa.storage.fingerprint import check_base, compare_fingerprints, fingerprint, from_metadata, to_metadata
from lorafa.storage.tensors import read_tensors, write_tensors


def base(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor | None]]:
    """Weights of a linear layer, an embedding, a convolution, a single row and a layer that gives none."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (16, 8), "embed": (50, 8), "conv": (6, 3, 5, 5), "row": (7,)}
    weights = [(name, 0.02 * torch.randn(shape, generator=generator)) for name, shape in shapes.items()]
    return [*((name, weight.to(dtype)) for name, weight in weights), ("nf4", None)]


def test_the_same_weights_give_the_same_fingerprint_in_any_order_and_layout():
    turned = [(n, w if w is None else w.transpose(0, -1).contiguous().transpose(0, -1)) for n, w in reversed(base())]
    assert fingerprint(turned) == fingerprint(base())
    assert list(fingerprint(turned)) == sorted(fingerprint(turned))


def test_a_parameter_that_requires_grad_is_described_like_its_values():
    weight = torch.randn(4, 4)
    assert fingerprint([("q", torch.nn.Parameter(weight))]) == fingerprint([("q", weight)])


TYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


@pytest.mark.parametrize("stored", TYPES)
@pytest.mark.parametrize("loaded", TYPES)
def test_loading_the_same_checkpoint_in_another_type_is_no_difference(stored, loaded):
    """One checkpoint, read in two types: rounding to bfloat16 evens out all but float16, which is compared by value."""
    assert compare_fingerprints(fingerprint(base(dtype=stored)), fingerprint(base(dtype=loaded))) == []


@pytest.mark.parametrize("dtype", TYPES)
def test_other_weights_are_found_in_every_layer(dtype):
    different = compare_fingerprints(fingerprint(base(0)), fingerprint(base(1, dtype)))
    assert different == ["conv", "embed", "q", "row"]


def test_one_trained_layer_is_found():
    changed = [(n, w if n != "q" or w is None else w * 1.01) for n, w in base()]
    assert compare_fingerprints(fingerprint(base()), fingerprint(changed)) == ["q"]


def test_another_shape_is_a_difference_even_when_the_rows_agree():
    assert compare_fingerprints(fingerprint([("q", torch.zeros(4, 2))]), fingerprint([("q", torch.zeros(5, 2))])) == [
        "q"
    ]


def test_layers_that_one_side_could_not_read_or_does_not_have_are_passed_over():
    readable = [("q", torch.ones(2, 2)), ("v", torch.ones(2, 2)), ("extra", torch.ones(2, 2))]
    assert compare_fingerprints(fingerprint([("q", None), ("v", torch.ones(2, 2))]), fingerprint(readable)) == []
    assert compare_fingerprints(fingerprint(readable), fingerprint([("q", None)])) == []


def test_only_a_few_rows_are_read():
    """A million rows; the ones between first, middle and last may be anything."""
    weight = torch.zeros(1_000_001, 4)
    other = weight.clone()
    other[1:500_000] = 1
    assert fingerprint([("q", weight)]) == fingerprint([("q", other)])
    other[500_000] = 1
    assert fingerprint([("q", weight)]) != fingerprint([("q", other)])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (1, 1), (2, 3), ()])
def test_small_and_empty_weights_have_a_fingerprint(shape):
    weight = torch.ones(shape)
    assert compare_fingerprints(fingerprint([("q", weight)]), fingerprint([("q", weight.bfloat16())])) == []


def test_the_hash_is_a_fixed_function_of_the_values():
    """blake2b of the bfloat16 bits 0x3f80 0xc000 (1 and -2), low byte first: files stay comparable across versions."""
    import hashlib

    expected = hashlib.blake2b(bytes([0x80, 0x3F, 0x00, 0xC0]), digest_size=8).hexdigest()
    assert fingerprint([("q", torch.tensor([[1.0, -2.0]]))])["q"]["hash"] == expected


def test_it_travels_in_the_header_of_the_file(tmp_path):
    entries = {"version": "0.1.0", "fingerprint": fingerprint(base())}
    write_tensors(tmp_path / "w.safetensors", {"a": torch.ones(1)}, to_metadata(entries))
    metadata = read_tensors(tmp_path / "w.safetensors")[1]
    assert metadata.keys() == {"format", "lorafa"}
    read = from_metadata(metadata)
    assert json.loads(metadata["lorafa"]) == read == entries
    assert compare_fingerprints(read["fingerprint"], fingerprint(base(dtype=torch.float16))) == []


def test_a_file_of_another_library_has_no_entries():
    assert from_metadata({"format": "pt"}) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"The entry 'lorafa' in the file's header is not json: .*\. Fetch or save the file again\."),
        ("[]", r"The entry 'lorafa' in the file's header is a list, expected a dict\. Fetch or save the file again\."),
    ],
)
def test_a_damaged_entry_is_refused(text, message):
    with pytest.raises(CheckpointError, match=message):
        from_metadata({"lorafa": text})


def test_an_adapter_made_for_other_weights_is_refused_with_layers_and_the_way_out():
    stored = fingerprint(base(0))
    check_base(stored, fingerprint(base(0, torch.bfloat16)), "dir")
    text = (
        r"dir was made for another base model: 4 of 5 adapted layers have other weights here: conv, embed, q "
        r"\.\.\. and 1 more\. Its update would be added to weights it was not trained on\. Load org/base, or pass "
        r"ignore_base_mismatch=True if the difference is meant\. Nothing was loaded\."
    )
    with pytest.raises(CheckpointError, match=text):
        check_base(stored, fingerprint(base(1)), "dir", base_name="org/base")
    with pytest.raises(CheckpointError, match=r"Load the base it was made for, or pass ignore_base_mismatch=True"):
        check_base(stored, fingerprint(base(1)), "dir")
