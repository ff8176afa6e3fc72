"""From init=... on the command line to the start of an adapter: what is accepted, and what every mistake gets."""

from __future__ import annotations

import pytest

from lorafa.conf.compose import compose
from lorafa.errors import ConfigError
from lorafa.settings.typed import plain
from lorafa.train.recipe import lora_config
from lorafa.train.settings.init import InitConfig
from toys.places import ROOT

DOCUMENTED = (
    "+init=gradient ++init.direction=LoRA-FA ++init.scale=stable ++init.stable_gamma=128 ++init.bsz=1 ++init.iters=8 "
    "++init.max_length=1024"
)
"""The command of docs/starts.md."""


@pytest.mark.parametrize(
    ("overrides", "start", "field", "settings"),
    [
        (DOCUMENTED, "lora_one", "init_config", {"scale": "stable", "stable_gamma": 128.0}),
        ("init=gradient init.direction=ArBr init.norm_clip=true", "lora_ga_clipped", "init_config", {}),
        ("+init=gradient init.stable_gamma=auto", "lora_one", "init_config", {"stable_gamma": "auto"}),
        ("+init=gradient init.direction=ArBr", "lora_ga", "lora_ga_config", {"scale": "stable", "stable_gamma": 16}),
        ("+init=gradient init.direction=ArBr init.scale=gd", "lora_ga", "lora_ga_config", {"scale": "gd_scale"}),
        ("init=lora_ga init.direction=random", "lora_ga", "lora_ga_config", {"direction": "random"}),
        ("init=functional init.normalize=global", "functional", "init_config", {"normalize": "global"}),
        ("+init=svd init.exact=true", "pissa", "init_config", {"exact": True}),
        ("+init=kaiming", True, None, {}),
        ("+init=gaussian", "gaussian", None, {}),
        ("+init=eva init.rho=1.5 init.whiten=true", "eva", "eva_config", {"rho": 1.5, "whiten": True}),
        ("+init=corda init.corda_method=kpm", "corda", "corda_config", {"corda_method": "kpm"}),
        ("+init=olora init.pivoted=true", "olora", "init_config", {"pivoted": True}),
        ("+init=loftq init.loftq_bits=8 init.loftq_iter=3", "loftq", None, {}),
        ("init=gora init.step=0.1", "gora", "init_config", {"step": 0.1}),
        ("init=lora_sb init.eta=1e-4", "lora_sb", "init_config", {"eta": 1e-4}),
        *((f"init={name}", name, None, {}) for name in ("milora", "mica", "kasa", "lora_null")),
    ],
)
def test_starts_of_the_documents_become_configs(
    overrides: str, start: object, field: str | None, settings: dict[str, object]
) -> None:
    config = lora_config(compose(overrides.split()))
    assert config.init_lora_weights == start
    for name, value in settings.items():
        assert getattr(getattr(config, str(field)), name) == value
    if start == "loftq":
        assert config.loftq_config == {"loftq_bits": 8, "loftq_iter": 3}


def test_the_documented_command_sets_what_it_names_and_nothing_else() -> None:
    named = {"direction": "LoRA-FA", "scale": "stable", "stable_gamma": 128.0, "bsz": 1, "iters": 8, "max_length": 1024}
    default = plain(compose(["init=gradient"]))
    assert plain(compose(DOCUMENTED.split())) == default | {"init": default["init"] | named}
    assert DOCUMENTED in (ROOT / "docs" / "starts.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("overrides", "dropout"),
    [
        ("", 0.05),
        ("peft=dora init=lora_one", 0.05),
        ("init=pissa", 0.0),
        ("init=gradient init.direction=ArB2r", 0.0),
        ("init=pissa peft.lora_dropout=0.1", 0.1),
        ("peft.lora_dropout=0", 0.0),
    ],
)
def test_dropout_is_left_out_where_it_would_act_on_a_part_of_the_base(overrides: str, dropout: float) -> None:
    assert lora_config(compose(overrides.split())).lora_dropout == dropout


@pytest.mark.parametrize(
    "overrides",
    [
        "init=kaiming init.ranks=entropy init.bsz=2 init.iters=3 init.max_length=99 init.passes=4 init.r_min=1",
        "init=functional init.passes=2",
        "init=eva init.bsz=2 init.ranks=energy init.passes=2",
        "init=corda init.iters=3 init.max_length=99",
        "init=pissa init.bsz=1 init.iters=8 init.passes=1",
    ],
)
def test_settings_of_reading_are_taken_where_something_is_read(overrides: str) -> None:
    for override in overrides.split()[1:]:
        name, value = override.removeprefix("init.").split("=")
        assert str(getattr(compose(overrides.split()).init, name)) == value


def test_a_start_that_is_no_name_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"init\.mode is the name of a start, found None \(NoneType\)\. Pass 'default'"
    ):
        InitConfig(mode=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            "init=pissa init.rho=2",
            r"no setting 'init\.rho' for init=pissa \(found 2\)\. It belongs to init=eva, .*, "
            r"init\.ranks=explained_variance\. init=pissa has: mode, .*, exact\.",
        ),
        (
            "init=gaussian init.scale=unit",
            r"'init\.scale' for init=gaussian .* belongs to .*init=lora_one,",
        ),
        ("init=lora_one init.direction=ArBr", r"no setting 'init\.direction' for init=lora_one .* to .*init=lora_ga,"),
        (
            "init=gradient init.direction=ArBr init.normalize=none",
            r"init\.normalize=none is LoRA-One's, and dir",
        ),
        (
            "init=gradient init.scale=gd init.stable_gamma=9",
            r"init\.stable_gamma=9\.0 would change nothing.* is gd",
        ),
        ("init=lora_one init.ranks=energi", r"init\.ranks has no value 'energi'\. Did you mean 'energy'\?"),
        (
            "init=lora_one init.ranks=budget init.share=0.5",
            r"'init\.share' for init=lora_one init\.ranks=budget ",
        ),
        ("init=eva init.ranks=energy init.share=2", r"init\.share must be a number in \(0, 1\], found 2"),
        ("init=lora_ga init.stable_gamma=auto", r"init\.stable_gamma must be a number, found 'auto'"),
        ("init=gradient init.iters=0", r"init\.iters must be an integer >= 1"),
        ("init=gradient init.ranks=budget init.r_min=4 init.r_max=2", r"r_max must be an integer >= 4"),
        ("init=gradient init.passes=3", r"passes must be 1 or an even number, found 3"),
        (
            "init=pissa init.ranks=cross_validation init.iters=1",
            r"compares two halves of the batches, and init\.iters is 1",
        ),
        ("init.passes=4", r"init\.passes=4 would change nothing: init\.mode=default reads no data\. Drop it"),
        ("init=pissa init.bsz=2", r"init\.bsz=2 would change nothing: init\.mode=pissa reads no data"),
        ("init=olora init.iters=9", r"init\.iters=9 would change nothing: init\.mode=olora reads no data"),
        ("init.max_length=99", r"init\.max_length=99 would change nothing: init\.mode=default reads no data"),
        *(
            (
                text,
                r"init\.passes=2 would change nothing: only a sketch of gradients takes more than one pass, and none",
            )
            for text in (
                "init=eva init.passes=2",
                "init=corda init.passes=2",
                "init=gora init.passes=2",
                "init=lora_one init.ranks=importance init.passes=2",
                "init=corda init.ranks=explained_variance init.passes=2",
            )
        ),
        ("init=gora init.r_min=2", r"init\.r_min=2 would change nothing: it bounds the ranks that init\.ranks chooses"),
        (
            "init=pissa init.ranks=explained_variance init.r_max=9",
            r"does not read r_max: it gives .* Drop r_max",
        ),
        ("init.r_max=2", r"init\.r_max=2 would change nothing: .*, and init\.ranks is null\. Drop it"),
        (
            "init=lora_one init.scale=gd init.stable_gamma=64",
            r"init\.stable_gamma=64\.0 is the gamma of scale='stable', and scale is 'gd'\. Set",
        ),
    ],
)
def test_a_setting_of_another_start_is_refused(overrides: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        compose(overrides.split())
