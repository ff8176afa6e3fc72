"""What is wrong with an objective is said before anything is loaded, by the setting to change."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from lorafa.conf.compose import compose
from lorafa.errors import ConfigError, TrainingError
from lorafa.models.kinds.causal import CAUSAL
from lorafa.models.kinds.seq2seq import SEQ2SEQ
from lorafa.runs.measures import final_loss
from lorafa.runs.record import RunDirectory
from lorafa.train.objectives import OBJECTIVES, needs
from lorafa.train.objectives.making import check_model, check_objective
from lorafa.train.objectives.needs import BELOW, LOWEST, require_trl
from lorafa.train.objectives.rewards import Scorer, scorers
from lorafa.train.objectives.work import require_plain_head
from toys.objectives import adapted
from toys.places import ROOT
from toys.runs import make_run

REFUSED = {
    "objective=dop": "objective has no option 'dop'. Did you mean 'dpo'? Known: dpo, grpo, kto, orpo, reward, sft.",
    "objective.beta=0.1": "There is no setting 'objective.beta' for objective=sft (found 0.1). It belongs to obj",
    "objective=dpo objective.num_generations=4": "for objective=dpo (found 4). It belongs to objective=grpo.",
    "objective=reward objective.beta=0.1": "There is no setting 'objective.beta' for objective=reward",
    "objective.dropout=true": "objective.dropout=true would change nothing: objective=sft trains with dropout anyway",
    "objective=dpo objective.beta=0": "objective.beta must be a number > 0, found 0.",
    "objective=dpo objective.loss_type=sigmoyd": "objective.loss_type",
    "objective=dpo objective.label_smoothing=0.1": "objective.label_smoothing=0.1 would change nothing: "
    "loss_type=sigmoid does not read it. Take loss_type=robust, or leave it out.",
    "objective=dpo objective.loss_type=robust objective.label_smoothing=0.5": "a number in [0, 0.5), found 0.5.",
    "objective=dpo objective.loss_type=exo_pair objective.label_smoothing=0": "=0 makes exo_pair infinite",
    "objective=kto objective.desirable_weight=0 objective.undesirable_weight=0": "are both 0. Raise one.",
    "objective=kto train.batch_size=1": "objective=kto holds each answer against others of its batch, and "
    "train.batch_size=1 has none. Set 2 or more, or objective.loss_type=apo_zero_unpaired.",
    "objective=grpo train.batch_size=6 objective.num_generations=4": "A step is of 6 answers (train.batch_size=6 x "
    "train.accumulation=1), which is no multiple of objective.num_generations=4",
    "objective=grpo objective.num_generations=1": "objective.num_generations must be an integer >= 2",
    "objective=grpo objective.reward=[]": "objective.reward=[] rewards nothing. Name a reward, gsm8k for example.",
    "objective=grpo objective.reward_weights=[1,2]": "objective.reward_weights has 2 numbers for 1 rewards. Give",
    "objective=grpo train.eval_every=2": "The held-out loss of objective=grpo says nothing of how well a model does",
    "objective=dpo align=base": "align=base and objective=dpo both say what the model is held close to.",
    "objective=dpo peft=full_ft": "objective=dpo trains an adapter, and compares it with where it",
    "objective=dpo train.packing=true": "train.packing=true puts several samples into one row, and "
    "objective=dpo scores each answer by itself.",
    "objective=orpo train.chunked_loss=false": "train.chunked_loss=false would change nothing: the loss",
    "objective=dpo model.kind=seq2seq": "objective=dpo trains a causal language model, found model.kind=seq2seq.",
    "objective=reward model.kind=causal": "objective=reward trains a reward model, found model.kind=causal.",
    "objective=dpo peft.lora_dropout=0.1": "peft.lora_dropout=0.1 would change nothing: objective=dpo trains without "
    "dropout, so that a model and its reference are compared by what they have learnt. Leave it out, or set "
    "objective.dropout=true.",
}


@pytest.mark.parametrize("words", REFUSED)
def test_settings_that_do_not_go_together_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[words])):
        compose(words.split())


def test_dropout_is_off_where_nothing_is_said_and_may_be_asked_for() -> None:
    from lorafa.train.adapter_config import lora_config

    assert lora_config(compose(["objective=sft"])).lora_dropout == 0.05
    assert lora_config(compose(["objective=dpo"])).lora_dropout == 0.0
    assert lora_config(compose(["objective=dpo", "objective.dropout=true"])).lora_dropout == 0.05


def test_nothing_said_is_supervised_fine_tuning() -> None:
    config = compose([])
    assert config.objective.name == "sft"
    assert config.objective.entry.is_own
    assert [name for name in OBJECTIVES.names() if OBJECTIVES.get(name).is_own] == ["sft"]


# ---- TRL


def test_without_trl_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise needs.PackageNotFoundError(name)

    monkeypatch.setattr(needs, "version", absent)
    with pytest.raises(ConfigError, match=re.escape("objective=dpo trains by TRL, which is not installed. Install")):
        check_objective(compose(["objective=dpo"]))
    with pytest.raises(ConfigError, match=re.escape(f'pip install "lorafa[trl]" (trl>={LOWEST},<{BELOW}')):
        require_trl("kto")
    check_objective(compose([]))  # our own trainer needs none


@pytest.mark.parametrize("found", ["0.9.6", "1.15.9", "1.17.0", "2.0.0.dev0", "of somebody"])
def test_another_version_of_trl_is_refused_by_name(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "version", lambda name: found)
    text = f"objective=dpo trains by TRL {LOWEST} to below {BELOW}, found trl {found}, whose trainers"
    with pytest.raises(ConfigError, match=re.escape(text)):
        require_trl("dpo")


def test_several_gpus_in_one_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "version", lambda name: LOWEST)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(ConfigError, match=r"objective=dpo trains on one GPU, and this process sees 4, among which TRL"):
        check_objective(compose(["objective=dpo"]))
    check_objective(compose([]))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "version", lambda name: LOWEST)
    monkeypatch.setattr("lorafa.train.objectives.making.world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"objective=kto trains in one process, and this is one of 2. Start it alone"):
        check_objective(compose(["objective=kto"]))


def test_the_versions_are_those_of_the_extra() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"trl>={LOWEST},<{BELOW} ; python_version' in text



# ---- models


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"objective=dpo \(direct preference optimization\) trains models of the"):
        check_model(SEQ2SEQ, compose(["objective=dpo"]))
    check_model(CAUSAL, compose(["objective=dpo"]))


def test_a_reward_model_is_trained_by_its_objective_alone() -> None:
    from lorafa.models.kinds.reward import REWARD

    with pytest.raises(ConfigError, match=r"model.kind=reward is trained by objective=reward, found objective=sft"):
        check_model(REWARD, compose(["model.kind=reward"]))


def test_a_start_that_reads_answers_is_refused_where_none_are_learnt() -> None:
    from lorafa.models.kinds.reward import REWARD

    with pytest.raises(ConfigError, match="reads what a model does with answers it learns, and objective=reward"):
        check_model(REWARD, compose(["objective=reward", "init=lora_ga"]))


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"lm_head": [1, 2]}},
    ],
    ids=["an adapter", "a copy", "rows"],
)
def test_what_is_trained_on_the_head_is_refused_where_it_would_be_passed_by(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="multiplies by the weight of the output head itself, so what is trained"):
        require_plain_head(adapted(**changes), "dpo")
    require_plain_head(adapted(), "dpo")


def test_runs_without_a_loss_of_answers_are_not_compared_by_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", loss=1.0, after={"preference_accuracy": 0.75, "preference_margin": 1.5})
    text = "measures preference_accuracy, preference_margin and no loss of answers, by which runs are compared."
    with pytest.raises(ConfigError, match=re.escape(text)):
        final_loss(RunDirectory.open(run))


# ---- rewards


def test_an_unknown_reward_is_refused_with_the_known_ones() -> None:
    text = "Unknown reward 'gsm8'. Did you mean 'gsm8k'? Known: exact_match, gsm8k; a function of your own is named"
    with pytest.raises(ConfigError, match=re.escape(text)):
        scorers("gsm8")


OWN = """
def good(completions, **_): return [1.0] * len(completions)
def fails(completions, **_): raise KeyError("answer")
def strict(prompts): return []
def short(completions, **_): return [1.0]
def one(completions, **_): return 1.0
def nan(completions, **_): return [0.0, float("nan")]
def none(completions, **_): return [0.0, None]
number = 3
"""
FAILS = {
    "fails": "The reward {}:fails failed on 2 answers: KeyError: 'answer'. It is called with prompts, completions,",
    "strict": "The reward {}:strict failed on 2 answers: TypeError:",
    "short": "The reward {}:short returned 1 values for 2 answers. Return a list with a number for each.",
    "one": "The reward {}:one returned float for 2 answers. Return a list with a number for each.",
    "nan": "The reward {}:nan returned nan for answer 2 of 2. Return a finite number for each",
    "none": "The reward {}:none returned None for answer 2 of 2. Return a finite number for each",
}
ASKED = {"prompts": [[], []], "completions": [[{"role": "assistant", "content": "a"}]] * 2, "answer": ["1", "2"]}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_rewards.py").write_text(OWN)
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    yield "own_rewards"  # type: ignore[misc]
    sys.modules.pop("own_rewards", None)


@pytest.mark.parametrize("function", FAILS)
def test_a_reward_that_fails_or_returns_something_else_is_named(function: str, own: str) -> None:
    (scorer,) = scorers(f"{own}:{function}")
    with pytest.raises(TrainingError, match=re.escape(FAILS[function].format(own))):
        scorer(**ASKED)


def test_a_reward_of_the_user_is_found_in_the_current_folder(own: str) -> None:
    path = list(sys.path)
    assert Scorer(f"{own}:good")(**ASKED) == [1.0, 1.0]
    assert sys.path == path


def test_a_module_or_function_that_is_not_there_is_named(own: str) -> None:
    with pytest.raises(ConfigError, match=r"objective.reward=no_such:f: the module 'no_such' cannot be imported"):
        scorers("no_such:f")
    with pytest.raises(ConfigError, match=r"'own_rewards' has no function 'goods'\. Did you mean 'good'\?"):
        scorers(f"{own}:goods")
    with pytest.raises(ConfigError, match="'own_rewards' has no function 'number'"):
        scorers(f"{own}:number")
    with pytest.raises(ConfigError, match="fails when it is imported: ZeroDivisionError"):
        scorers("broken_rewards:f")


@pytest.mark.parametrize(
    ("reward", "written", "answer", "worth"),
    [
        ("gsm8k", "2 + 3 = 5\n#### 5", "5", 1.0),
        ("gsm8k", "The answer is 1,000.", "1000", 1.0),
        ("gsm8k", "5", "5", 0.0),
        ("gsm8k", "#### 6", "5", 0.0),
        ("exact_match", " yes\n", "yes", 1.0),
        ("exact_match", "yes.", "yes", 0.0),
    ],
)
def test_rewards_by_name_read_answers_as_evaluations_do(reward: str, written: str, answer: str, worth: float) -> None:
    (scorer,) = scorers(reward)
    completions = [[{"role": "assistant", "content": written}]]
    assert scorer(prompts=[[]], completions=completions, answer=[answer]) == [worth]
