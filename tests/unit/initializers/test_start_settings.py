"""What a config and its start say of each other: settings, the seed, ranks that the method chooses itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorafa import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    RankRule,
    get_peft_model,
    preprocess_corda,
)
from lorafa.errors import ConfigError
from lorafa.initializers import INITIALIZERS, known_start
from lorafa.initializers.gora import GoraConfig
from lorafa.initializers.lora_one import LoraOneConfig
from lorafa.initializers.pissa import PissaConfig
from lorafa.initializers.settings import settings_class, settings_field

SETTINGS: dict[bool | str, tuple[str | None, type[Any] | None]] = {
    True: (None, None),
    "gaussian": (None, None),
    "eva": ("eva_config", EvaConfig),
    "corda": ("corda_config", CordaConfig),
    "loftq": ("loftq_config", LoftQConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
    "lora_ga_peft": ("lora_ga_config", LoraGAConfig),
    "lora_one": ("init_config", LoraOneConfig),
    "functional": ("init_config", LoraOneConfig),
    "pissa_niter_4": ("init_config", PissaConfig),
}


@pytest.mark.parametrize(("start", "expected"), SETTINGS.items(), ids=lambda value: str(value)[:20])
def test_a_start_has_a_field_and_a_class_of_settings(
    start: bool | str, expected: tuple[str | None, type[Any] | None]
) -> None:
    found = known_start(start)
    assert (settings_field(found), settings_class(found)) == expected


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga", "lora_one"])
def test_settings_set_later_as_a_dict_reach_the_start_as_its_class_and_wrong_ones_are_refused(start: str) -> None:
    config = LoraConfig(init_lora_weights=start)
    field, kind = SETTINGS[start]
    assert field is not None
    assert kind is not None
    assert config.start_settings() == kind()
    setattr(config, field, {})
    assert config.start_settings() == kind()
    setattr(config, field, {"nothing": 1})
    with pytest.raises(ConfigError, match="nothing"):
        config.start_settings()


def test_the_settings_of_loftq_are_kept_as_a_dict_and_read_as_an_object() -> None:
    """As in PEFT, whose files hold {} for every other start."""
    config = LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=8))
    assert config.loftq_config == {"loftq_bits": 8, "loftq_iter": 1}
    assert config.start_settings() == LoftQConfig(loftq_bits=8)
    assert LoraConfig().loftq_config == {}


def test_random_starts_are_drawn_from_init_seed_or_torchs_own() -> None:
    torch.manual_seed(1234)
    assert LoraConfig().seed == 1234
    assert LoraConfig(init_seed=0).seed == 0
    assert "seed" not in LoraConfig(init_seed=0).to_dict()


def test_corda_keeps_its_covariances_in_covariance_file_and_in_cache_file_where_there_is_none(tmp_path: Path) -> None:
    """PEFT keeps decompositions in the second; both together are usual there."""
    names, kept = ("covariance_file", "cache_file"), []
    for given in (names, names[1:]):
        files = {name: str(tmp_path / f"{len(given)}_{name}.safetensors") for name in given}
        config = LoraConfig(target_modules=["0"], init_lora_weights="corda", r=2, corda_config=CordaConfig(**files))
        model, x = nn.Sequential(nn.Linear(6, 6)), torch.randn(9, 6)
        preprocess_corda(model, config, lambda model=model, x=x: model(x))
        kept.append([file.name for file in sorted(tmp_path.iterdir())])
    assert kept[0] == ["2_covariance_file.safetensors"]
    assert kept[1] == ["1_cache_file.safetensors", "2_covariance_file.safetensors"]


def test_what_corda_takes_for_pefts_sake_alone_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    x, starts = torch.randn(9, 6), []
    for switch in (False, True):
        torch.manual_seed(0)
        settings = CordaConfig(verbose=switch, prune_temporary_fields=switch)
        config = LoraConfig(target_modules=["0"], init_lora_weights="corda", r=2, corda_config=settings)
        model = nn.Sequential(nn.Linear(6, 6))
        preprocess_corda(model, config, lambda model=model: model(x))
        starts.append(get_peft_model(model, config).get_base_model()[0].factor_A("default"))  # type: ignore[operator]
        assert not {"eigens", "covariance_matrix"} & vars(model[0]).keys()
    assert torch.equal(*starts)
    assert capsys.readouterr() == ("", "")


RULES: list[tuple[str, Any, int, dict[str, Any] | None]] = [
    ("eva", EvaConfig(), 8, {"rule": "explained_variance", "rho": 2.0}),
    ("eva", EvaConfig(rho=1.0), 8, None),
    ("gora", GoraConfig(), 8, {"rule": "importance", "r_min": 4, "r_max": 32}),
    ("gora", GoraConfig(), 1, {"rule": "importance", "r_min": 1, "r_max": 4}),
    ("gora", GoraConfig(share_ranks=False), 8, None),
]


@pytest.mark.parametrize(("name", "settings", "r", "expected"), RULES)
def test_a_start_that_shares_ranks_out_says_by_which_rule(
    name: str, settings: Any, r: int, expected: dict[str, Any] | None
) -> None:
    own = INITIALIZERS.get(name).own_ranks
    assert own is not None
    assert own(settings, r) == expected
    if expected is not None:
        RankRule(**expected)


def test_no_other_start_shares_ranks_out_and_gora_alone_scales_by_them() -> None:
    starts = {name: INITIALIZERS.get(name) for name in INITIALIZERS.names()}
    assert {name for name, start in starts.items() if start.own_ranks} == {"eva", "gora"}
    assert {name for name, start in starts.items() if start.own_scaling} == {"gora"}
