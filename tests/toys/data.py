"""Numbers and samples."""

from __future__ import annotations

import torch
from torch import Tensor


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_tensors() -> dict[str, Tensor]:
    """As an adapter's file holds them, of three dtypes."""
    generator = torch.Generator().manual_seed(0)
    return {
        "a.lora_A.weight": torch.randn(2, 5, generator=generator),
        "a.lora_B.weight": torch.randn(4, 2, generator=generator).to(torch.bfloat16),
        "steps": torch.tensor([1, 2, 3]),
    }


VOCAB, SAMPLES = 53, 10


def samples(count: int = SAMPLES, seed: int = 0) -> list[dict[str, list[int]]]:
    """Samples of 4 to 12 tokens whose first two are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
    ids = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, value: int) -> Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", -100)}


class Counting(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sixteen rows that count on from their number, which a model of 32 tokens can learn."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(8) + index) % 29 + 2
        return {"input_ids": ids, "labels": ids}
