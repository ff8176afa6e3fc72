"""Chat templates of the shapes there are, and small fast tokenizers of the kinds there are."""

from __future__ import annotations

from dataclasses import dataclass

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lorafa.data.chat import Sample
from lorafa.data.records import Message
from lorafa.data.templates import ALPACA, CHATML, PLAIN, VICUNA

START = "<|im_start|>"
END = "<|im_end|>"
EOS = "<|endoftext|>"
SPECIAL = [EOS, START, END, "<|user|>", "<|assistant|>", "<|system|>"]
WORDS = ["</answer>", "</tool_call>"]
"""Added to the vocabulary, and no special tokens."""


@dataclass(frozen=True)
class Shape:
    """A chat template, and what it writes around the words of an assistant's turn that is trained."""

    template: str
    before: str = ""
    """Between what is asked and the words."""
    end: str = EOS
    """After the words, the end token included."""


def _each(turn: str, asks: str = "", first: str = "") -> str:
    asked = "{% if add_generation_prompt %}{{ '" + asks + "' }}{% endif %}" if asks else ""
    return first + "{% for m in messages %}" + turn + "{% endfor %}" + asked


_DEFAULT = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
_TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
_ASKS = "<|im_start|>assistant\\n"
_LINE = "{{ m.role + ': ' + m.content + '\\n' }}"
_BRACKETS = (
    "{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}"
)
_MARKED = (
    "{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\\n' }}{% else %}" + _TURN + "{% endif %}"
)
SHAPES = {
    "ChatML": Shape(_each(_TURN, _ASKS), end=END),
    "ChatML with a system prompt of its own": Shape(_each(_TURN, _ASKS, _DEFAULT), end=END),
    "ChatML that does not say when it asks": Shape(_each(_TURN), end=END),
    "generation marks": Shape(_each(_MARKED, _ASKS), end=END),
    "header tokens, no end": Shape(_each("{{ '<|' + m.role + '|>' + m.content }}", "<|assistant|>")),
    "header tokens that are written unasked, no end": Shape(_each("{{ '<|' + m.role + '|>' + m.content }}")),
    "header tokens, an end": Shape(
        _each("{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}", "<|assistant|>\\n"),
    ),
    "instruction brackets": Shape(_each(_BRACKETS), before=" ", end=" " + EOS),
    "names on lines, no end": Shape(_each(_LINE, "assistant: ")),
    "names on lines without the space, no end": Shape(_each(_LINE, "assistant:"), before=" "),
    "an end in the last turn": Shape(
        _each("{{ m.role + ': ' + m.content }}{% if loop.last %}{{ '<|im_end|>' }}{% else %}{{ '\\n' }}{% endif %}",
              "assistant: "), end=END,
    ),
    "an end on a line of its own": Shape(
        _each("{{ m.role + ': ' + m.content + '\\n<|im_end|>\\n' }}", "assistant: "), end="\n" + END
    ),
    "an end, and another after the conversation": Shape(
        _each(_TURN, _ASKS) + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", end=END
    ),
    "plain": Shape(PLAIN.text),
    "our ChatML": Shape(CHATML.text, end=END),
    "Alpaca": Shape(ALPACA.text),
    "Vicuna": Shape(VICUNA.text, before=" "),
}  # fmt: skip

TEXTS = ["def f(x):\n    return x", "Two words and\n\na line.", "  x = 1", "The answer is 42.", "a b a b a b: [/INST] "]


def bytes_merged(pairs: int = 300) -> Tokenizer:
    """BPE over bytes with merges, so that tokens may lie across any two characters: `` return``, ``\\n\\n``."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=256 + pairs, initial_alphabet=alphabet, show_progress=False)
    lines = [f"{role}: {text}\n" for role in ("user", "assistant") for text in TEXTS]
    core.train_from_iterator([*lines, *("\n" + text for text in TEXTS)] * 3, trainer)
    return core


def bytes_with_prefix() -> Tokenizer:
    """The same, with a space before each text, as RoBERTa has it."""
    core = bytes_merged()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    return core


def _pieces() -> models.BPE:
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    letters = sorted({c for text in [*TEXTS, "userassistantsystem:[]/INST|<>_."] for c in text} - {" ", "\n"} | {"▁"})
    merges = [("▁", "a"), ("▁", "r"), ("a", "n"), ("▁", "▁"), ("an", "s"), (":", "▁"), ("▁", "x"), ("T", "h")]
    vocab = {token: i for i, token in enumerate(["<unk>", *bytes_, *letters, *("".join(pair) for pair in merges)])}
    return models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)


def sentencepiece(scheme: str = "first") -> Tokenizer:
    """Pieces with byte fallback and a space before the first text (``first``), or each between tokens (``always``)."""
    core = Tokenizer(_pieces())
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return core


def sentencepiece_of_llama() -> Tokenizer:
    """The same with the space put in by the normalizer, after special tokens too, as Llama 2 has it."""
    core = sentencepiece()
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = None
    return core


KINDS = {
    "bytes": bytes_merged,
    "bytes, a space before": bytes_with_prefix,
    "sentencepiece": sentencepiece,
    "sentencepiece, always a space": lambda: sentencepiece("always"),
    "sentencepiece of Llama": sentencepiece_of_llama,
}


def chat_tokenizer(kind: str, template: str | None, **tokens: str) -> transformers.PreTrainedTokenizerFast:
    """``EOS`` is the end of a sequence and the padding; ``WORDS`` are added tokens."""
    core = KINDS[kind]()
    core.add_special_tokens(SPECIAL)
    core.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    names = {"eos_token": EOS, "pad_token": EOS} | tokens
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **names)


def decoded(tokenizer: transformers.PreTrainedTokenizerFast, ids: list[int]) -> str:
    """The text of ids as it stands after others: a decoder strips the space before the first text."""
    guard = tokenizer("|").input_ids
    text: str = tokenizer.decode(guard + ids, clean_up_tokenization_spaces=False)
    return text[len(tokenizer.decode(guard, clean_up_tokenization_spaces=False)) :]


def trained_parts(sample: Sample) -> list[tuple[int, int]]:
    """[start, stop) of each run of trained tokens."""
    flags = [label != -100 for label in sample.labels]
    starts = [i for i, flag in enumerate(flags) if flag and not (i and flags[i - 1])]
    return [(i, next((j for j in range(i, len(flags)) if not flags[j]), len(flags))) for i in starts]


def turns(*pairs: tuple[str, str]) -> tuple[Message, ...]:
    return tuple(Message(role, text) for role, text in pairs)
