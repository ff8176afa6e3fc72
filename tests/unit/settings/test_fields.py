"""Fields that say themselves what form and which values they have."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from lorafa import LoraConfig
from lorafa.errors import ConfigError
from lorafa.settings.checks import check_flag
from lorafa.settings.fields import check_fields, name_set, number, optional, patterns_to, setting, take_forms, whole

OF_THE_START = {"init_lora_weights"}
"""Fields whose values the start checks."""


@dataclass
class Few:
    """Four fields."""

    names: object = setting(form=name_set)
    rank: object = setting(8, check=whole(at_least=1))
    table: object = setting(check=patterns_to(number("a number > 0", 0)), factory=dict)
    seed: object = setting(check=optional(whole(at_least=0)))


def test_forms_are_copies_of_what_was_handed_in() -> None:
    given = ["q_proj", "v_proj"]
    few = Few(names=given)
    take_forms(few)
    assert few.names == {"q_proj", "v_proj"}
    assert given == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"rank": 0}, r"rank must be an integer >= 1, found 0"),
        ({"table": {"up": -1}}, r"table\['up'\] must be a number > 0, found -1"),
        ({"table": {"(": 1}}, r"table has '\(', which is no regular expression"),
        ({"seed": -1}, r"seed must be an integer >= 0"),
    ],
)
def test_a_check_is_said_with_the_name_of_its_field(values: dict[str, object], text: str) -> None:
    check_fields(Few())
    with pytest.raises(ConfigError, match=text):
        check_fields(Few(**values))


def test_every_field_of_a_config_says_what_it_takes() -> None:
    said = {f.name for f in fields(LoraConfig) if f.metadata.get("form") or f.metadata.get("check")}
    assert {f.name for f in fields(LoraConfig)} - said == OF_THE_START
    flags = {f.name for f in fields(LoraConfig) if isinstance(f.default, bool)} - OF_THE_START
    assert flags == {f.name for f in fields(LoraConfig) if f.metadata.get("check") is check_flag}
