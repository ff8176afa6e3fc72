"""Settings that are paths take their text as it stands, whatever Hydra's grammar makes of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lorafa.conf.compose import PATHS, as_it_stands, compose, read_value

TEXTS = ("a,b", "123", "true", "1e3", "nan", "[x]", "{a:1}", "choice(a,b)", "${x}", "range(1,3)", "a=b", "x#y", "'a")


@pytest.mark.parametrize("text", TEXTS)
def test_a_path_is_its_text(text: str) -> None:
    config = compose([f"run_dir={text}", f"model={text}", f"model.cache_dir={text}", f"data.eval_file={text}"])
    assert (config.run_dir, config.model.cache_dir, config.data.eval_file) == (text, text, text)
    assert config.model.name == text


def test_null_is_none_and_quotes_of_the_grammar_are_no_part_of_it() -> None:
    assert compose(["run_dir=null"]).run_dir is None
    assert compose(["run_dir='null'"]).run_dir == "null"
    assert compose(['run_dir="a b"']).run_dir == "a b"
    assert compose(["data=['${a}.jsonl',b.jsonl]"]).data.name == ["${a}.jsonl", "b.jsonl"]
    assert "train.resume" in PATHS


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("${}\\'\",ab []=:"), min_size=1, max_size=9))
def test_every_text_comes_back(text: str) -> None:
    value = read_value(text, "k", as_it_stands(text))
    assert OmegaConf.to_container(OmegaConf.create({"k": str(value)}), resolve=True) == {"k": text}
