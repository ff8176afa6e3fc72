"""A tokenizer of bytes and a tiny model, made on the spot: what the tests of data and evals read and write with."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafa.data.records import Message, Record

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(chat_template: str | None = CHATML, **tokens: str) -> PreTrainedTokenizerFast:
    """One id a byte, then the special tokens; by default ChatML with ``<|im_end|>`` as end and pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    names = tokens or {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **names)


def tiny_llama(vocab_size: int = 259, seed: int = 0) -> LlamaForCausalLM:
    """Two layers of width 32 in float32, large random weights: its greedy answers differ from prompt to prompt."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def conversation(*turns: str, answer: str | None = None) -> Record:
    """Turns of user and assistant by turns, the user first."""
    roles = ("user", "assistant")
    return Record(tuple(Message(roles[i % 2], text) for i, text in enumerate(turns)), answer)
