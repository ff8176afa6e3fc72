"""GRPO: the model's own answers, each by its reward beside the others of its prompt (Shao et al. 2024,
arXiv:2402.03300)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafa.data.preferences import PROMPTS
from lorafa.data.prompted import PROMPTED
from lorafa.errors import ConfigError
from lorafa.settings.checks import check_choice, check_int, check_number
from lorafa.train.objectives.entry import Objective

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
SCALES = ("group", "batch", "none")


@dataclass(frozen=True, kw_only=True)
class GrpoSettings:
    """How answers are drawn and rewarded."""

    reward: str | list[str] = "gsm8k"
    """What an answer is worth: gsm8k (1 where its final number is the row's), exact_match (1 where it is the row's word
    for word), a function of your own as module:function, or a list of these, which are added up."""
    reward_weights: list[float] | None = None
    """What each of several rewards weighs; null weighs all alike."""
    num_generations: int = 8
    """Answers to each prompt, 2 and more; train.batch_size * train.accumulation counts answers, and is a multiple."""
    max_completion_length: int = 256
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Divides the logits where answers are drawn; lower draws the likelier ones."""
    top_p: float = 1.0
    """Answers are drawn of the likeliest tokens that are this much of the probability together."""
    beta: float = 0.0
    """What the KL to the reference counts; 0 has no reference."""
    epsilon: float = 0.2
    """How far the ratio of new to old probability counts, to both sides of 1."""
    loss_type: str = "dapo"
    """How tokens weigh: grpo (each answer alike), bnpo, dapo (each token alike, in a batch or in a step), dr_grpo (by a
    constant length)."""
    scale_rewards: str = "group"
    """What rewards are divided by, beside the mean of their prompt taken off: group, batch (its standard deviation), or
    none."""

    def __post_init__(self) -> None:
        rewards = self.rewards
        if not rewards:
            raise ConfigError("objective.reward=[] rewards nothing. Name a reward, gsm8k for example.")
        if self.reward_weights is not None:
            if len(self.reward_weights) != len(rewards):
                raise ConfigError(
                    f"objective.reward_weights has {len(self.reward_weights)} numbers for {len(rewards)} rewards. Give "
                    "one for each."
                )
            for weight in self.reward_weights:
                check_number("objective.reward_weights", weight, "finite numbers", float("-inf"))
        check_int("objective.num_generations", self.num_generations, at_least=2)
        check_int("objective.max_completion_length", self.max_completion_length, at_least=1)
        check_number("objective.temperature", self.temperature, "a number > 0", 0)
        check_number("objective.top_p", self.top_p, "a number in (0, 1]", 0, 1, closed="]")
        check_number("objective.beta", self.beta, "a number >= 0", 0, closed="[")
        check_number("objective.epsilon", self.epsilon, "a number > 0", 0)
        check_choice("objective.loss_type", self.loss_type, LOSSES)
        check_choice("objective.scale_rewards", self.scale_rewards, SCALES)

    @property
    def rewards(self) -> list[str]:
        """The names of the rewards."""
        return [self.reward] if isinstance(self.reward, str) else list(self.reward)


def _code(own: GrpoSettings) -> list[str]:
    return own.rewards if any(":" in name for name in own.rewards) else []


def _check(own: GrpoSettings, train: Any) -> None:
    answers = train.batch_size * train.accumulation
    if answers % own.num_generations:
        raise ConfigError(
            f"A step is of {answers} answers (train.batch_size={train.batch_size} x train.accumulation="
            f"{train.accumulation}), which is no multiple of objective.num_generations={own.num_generations}: the "
            "answers to one prompt are compared with each other. Change one of them."
        )


def _samples_of_pass(own: GrpoSettings, train: Any, rows: int) -> int:
    """The answers to all prompts that fill whole steps."""
    prompts = train.batch_size * train.accumulation // own.num_generations
    return int(rows // prompts * prompts * own.num_generations)


def _require(own: GrpoSettings) -> None:
    from lorafa.train.objectives.rewards import scorers

    scorers(own.rewards)


def _trainer(work: Any) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    from lorafa.data.records import Message
    from lorafa.data.unanswered import Unanswered
    from lorafa.evals.answering import ends_of
    from lorafa.train.objectives.rewards import scorers

    own = work.own
    told = {
        "beta": 0.0,  # TRL would load a second model; ours is set below
        "num_generations": own.num_generations,
        "max_completion_length": own.max_completion_length,
        "temperature": own.temperature,
        "top_p": own.top_p,
        "epsilon": own.epsilon,
        "loss_type": own.loss_type,
        "scale_rewards": own.scale_rewards,
        "reward_weights": own.reward_weights,
        "include_num_input_tokens_seen": "no",  # the trainer counts them itself
    }
    if own.beta:
        work.reference()
    return work.build(
        GRPOTrainer,
        GRPOConfig,
        told,
        parts=_Asking,
        reward_funcs=scorers(own.rewards),
        distance=own.beta,
        asked={_key(row["prompt"]): row["prompt_ids"] for row in work.rows.train},
        ends=ends_of(work.tokenizer, Unanswered((Message("user", "?"),))),
    )


def _key(prompt: Sequence[Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((turn["role"], turn["content"]) for turn in prompt)


class _Asking:
    """TRL's trainer with our prompts, our order of them and our reference.

    Args:
        distance: what the KL to the reference counts.
        asked: the token ids of each prompt.
        ends: the ids with which answers end, beside the model's own.
    """

    def __init__(
        self, *args: Any, distance: float, asked: Mapping[Any, list[int]], ends: frozenset[int], **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self._asked = asked
        self.beta, self.ref_model = distance, self.reference if distance else None  # type: ignore[attr-defined]
        self.eos_token_ids = sorted({*self.eos_token_ids, *ends})  # type: ignore[has-type]
        self.generation_config.eos_token_id = self.eos_token_ids  # type: ignore[attr-defined]
        self.generation_kwargs["eos_token_id"] = self.eos_token_ids  # type: ignore[attr-defined]

    def _tokenize_prompts(self, prompts: Sequence[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self._asked[_key(prompt)] for prompt in prompts], None, {}

    def _sampler(self, dataset: Any, batch_size: int, random: bool) -> Any:
        if not random:  # transformers' rules: TRL's own order
            return None
        from lorafa.train.objectives.groups import GroupSampler

        answers, args = self.num_generations, self.args  # type: ignore[attr-defined]
        return GroupSampler(
            len(dataset), answers, args.generation_batch_size // answers, args.steps_per_generation, args.seed
        )


GRPO = Objective(
    words="group relative policy optimization",
    settings=GrpoSettings,
    reading=PROMPTS,
    encoding=PROMPTED,
    kind="causal",
    rows="lorafa.train.objectives.rows:prompts",
    trainer=_trainer,
    check=_check,
    passes=_samples_of_pass,
    require=_require,
    code=_code,
    measure="lorafa.train.objectives.heldout:rewarded",
    metrics={
        "reward": "reward",
        "reward_std": "reward_std",
        "kl": "kl",
        "entropy": "entropy",
        "completions/mean_length": "answer_length",
        "completions/clipped_ratio": "answers_cut",
        "frac_reward_zero_std": "prompts_without_difference",
    },
    by_length=False,
    measures_loss=False,
    reads_head=True,
)
