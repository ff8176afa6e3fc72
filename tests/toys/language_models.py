"""Small models of transformers, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.data.records import Message, Record
from toys.adapters import train

IDS = torch.tensor([[1, 5, 7, 2, 9, 3], [4, 1, 0, 8, 6, 2]])


SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def llama(**options: Any) -> nn.Module:
    """Two layers of width 16; each time with the same weights."""
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SMALL | options)))
    return model


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def switch() -> nn.Module:
    """Experts in two halves, and outputs that are scaled because its tables are tied."""
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=2, num_experts=3,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.SwitchTransformersForConditionalGeneration(config)


def bart() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def bert(kind: type[nn.Module] = transformers.BertForSequenceClassification, labels: int = 3) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=labels,
    )
    return kind(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager",
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def qwen2_moe() -> nn.Module:
    config = transformers.Qwen2MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=20, moe_intermediate_size=12,
        shared_expert_intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_experts=3, num_experts_per_tok=2, experts_implementation="eager",
    )  # fmt: skip
    return transformers.Qwen2MoeForCausalLM(config)


class Transposed(nn.Module):
    """A transformers Conv1D, which keeps its weight as (in, out), between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv1D(20, 12)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh())


def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def seq2seq_logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS).logits


def adapted(base: nn.Module | None = None, **settings: Any) -> PeftModel:
    """With an adapter on all linear layers that has left its start."""
    model = get_peft_model(base or llama(), LoraConfig(**({"r": 4, "target_modules": "all-linear"} | settings)))
    train(model, 0.1)
    return model


@torch.no_grad()
def inference(model: nn.Module) -> Tensor:
    """Its logits in eval mode."""
    return logits(model.eval())


def loss_and_gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | gradients


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(chat_template: str | None = CHATML, **tokens: str) -> transformers.PreTrainedTokenizerFast:
    """One id a byte, then the special tokens; by default ChatML with ``<|im_end|>`` as end and pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    names = tokens or {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **names)


def tiny_llama(vocab_size: int = 259, seed: int = 0) -> transformers.LlamaForCausalLM:
    """Two layers of width 32 in float32, large random weights: its greedy answers differ from prompt to prompt."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def conversation(*turns: str, answer: str | None = None) -> Record:
    """Turns of user and assistant by turns, the user first."""
    roles = ("user", "assistant")
    return Record(tuple(Message(roles[i % 2], text) for i, text in enumerate(turns)), answer)


@torch.no_grad()
def greedy_by_hand(model: Any, prompt: Sequence[int], count: int, ends: Collection[int]) -> list[int]:
    """The definition: append the likeliest token, one full forward pass at a time, no cache, no padding."""
    ids = list(prompt)
    for _ in range(count):
        best = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if best in ends:
            break
        ids.append(best)
    return ids[len(prompt) :]
