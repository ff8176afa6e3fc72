"""Patterns of names, as PEFT compares them."""

from __future__ import annotations

import re

import pytest

from lorafa import LoraConfig
from lorafa.surgery.patterns import any_of, exactly, key_of, numbers_of

NAMES = ["a.proj", "b.a.proj", "a.pro.j", "aXproj", "a.proj.x", "proj"]


@pytest.mark.parametrize("name", NAMES)
def test_patterns_for_names_mean_these_and_no_others(name: str) -> None:
    assert [other for other in NAMES if key_of([exactly(name)], other)] == [name]
    assert [other for other in NAMES if re.fullmatch(any_of([name, "a.proj"]), other)] == [
        other for other in NAMES if other in (name, "a.proj")
    ]


def test_the_first_pattern_that_is_an_end_or_an_expression_says_the_numbers() -> None:
    config = LoraConfig(
        r=2, lora_alpha=3, rank_pattern={exactly("proj"): 7, "proj": 5, r"b\..*": 9}, alpha_pattern={r".*\.proj": 4}
    )
    assert numbers_of(config, "proj") == (7, 3)
    assert numbers_of(config, "b.proj") == (5, 4)
    assert numbers_of(config, "b.x") == (9, 3)
    assert numbers_of(config, "myproj") == (2, 3)
