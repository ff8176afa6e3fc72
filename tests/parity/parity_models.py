"""Small models on which lorafa and PEFT are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

IDS = torch.tensor([[1, 5, 7, 2, 9, 3], [4, 1, 0, 8, 6, 2]])


class Linears(nn.Module):
    """Two linear layers and a head; x: (batch, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 10)
        self.norm = nn.LayerNorm(10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(x).tanh()).tanh()))


class Transposed(nn.Module):
    """A transformers Conv1D, which keeps its weight as (in, out), between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv1D(20, 12)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).tanh())


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


class Convolution(nn.Module):
    def __init__(self, dims: int, **options: Any) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv = kind(4, 6, 3, **options)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).tanh().flatten(2).mean(-1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


class Experts(nn.Module):
    """Bare parameters: one matrix and two stacks of three experts."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(12, 12) / 4)
        self.up = nn.Parameter(torch.randn(3, 12, 18) / 4)
        self.down = nn.Parameter(torch.randn(3, 18, 12) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.matrix.T
        return torch.einsum("bi,eio,eoj->bj", x, self.up, self.down)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.experts(x).tanh())


def llama(**options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


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


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def seq2seq_logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS).logits


def on(*shape: int) -> Callable[[nn.Module], Tensor]:
    """Run on fixed random numbers of a shape."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return lambda model: model(x.to(next(model.parameters()).dtype))
