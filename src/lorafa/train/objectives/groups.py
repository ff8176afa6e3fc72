"""The order of prompts that are answered several times each."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lorafa.train.sampling import OrderSampler


class GroupSampler(OrderSampler):
    """Each prompt several times in a row, by seed and epoch alone; what fills no whole batch of prompts is left out of
    an epoch.

    Args:
        count: prompts there are.
        answers: to each prompt.
        prompts: in a batch that is answered at once.
        parts: how often such a batch is handed out: once for each part of it that is trained on.
    """

    def __init__(self, count: int, answers: int, prompts: int, parts: int, seed: int) -> None:
        super().__init__(count, seed)
        self.answers, self.prompts, self.parts = answers, prompts, parts

    def __len__(self) -> int:
        return self.count // self.prompts * self.prompts * self.answers * self.parts

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.count, generator=self.generator()).tolist()
        batches = [order[at : at + self.prompts] for at in range(0, self.count - self.prompts + 1, self.prompts)]
        return iter(
            [prompt for batch in batches for _ in range(self.parts) for prompt in batch for _ in range(self.answers)]
        )
