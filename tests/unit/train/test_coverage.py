"""The coverage table: what is matched, how much of the model it is, what is trained."""

from __future__ import annotations

import io

from rich.console import Console
from torch import nn

from lorafa import LoraConfig, get_peft_model
from lorafa.train.coverage import CoverageRow, coverage, coverage_table
from toys.models import Stack


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)


class Toy(nn.Module):
    """Two blocks and an output head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def rows(**config: object) -> dict[str, CoverageRow]:
    return {row.name: row for row in coverage(get_peft_model(Toy(), LoraConfig(r=2, **config)))}  # type: ignore[arg-type]


def test_modules_of_one_kind_are_one_row() -> None:
    assert rows(target_modules=["up"])["up"] == CoverageRow(
        "up", "Linear", modules=2, matched=2, base=2 * (4 * 6 + 6), trainable=2 * 2 * (4 + 6)
    )


def test_a_kind_matched_in_part_says_so() -> None:
    row = rows(target_modules=r"blocks\.0\.up")["up"]
    assert (row.matched, row.modules, row.trainable) == (1, 2, 2 * (4 + 6))


def test_what_is_not_matched_is_listed_and_frozen() -> None:
    row = rows(target_modules=["up"])["norm"]
    assert (row.matched, row.base, row.trainable) == (0, 2 * 2 * 6, 0)


def test_the_rows_add_up_to_the_model_with_shared_weights_counted_once() -> None:
    assert sum(row.base for row in rows(target_modules=["up"]).values()) == sum(p.numel() for p in Toy().parameters())


def test_trained_parameters_without_an_adapter_are_seen() -> None:
    norm = rows(target_modules=["up"], modules_to_save=["norm"])["norm"]
    assert norm == CoverageRow("norm", "LayerNorm", modules=2, matched=0, base=2 * 2 * 6, trainable=2 * 2 * 6)


def test_trained_rows_of_an_embedding_are_seen() -> None:
    embed = rows(target_modules=["up"], trainable_token_indices={"embed": [1, 2, 3]})["embed"]
    assert (embed.kind, embed.matched, embed.base, embed.trainable) == ("Embedding", 0, 10 * 4, 3 * 4)


def test_stacked_experts_count_their_stack_and_not_their_children() -> None:
    model = nn.Sequential()
    model.add_module("mlp", Stack())
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.stack"])
    found = {row.name: row for row in coverage(get_peft_model(model, config))}
    assert found["mlp"] == CoverageRow("mlp", "Stack", modules=1, matched=1, base=3 * 4 * 6, trainable=3 * 2 * (4 + 6))
    assert (found["router"].base, found["router"].matched) == (6 * 3 + 3, 0)


def test_the_table_ends_with_the_sums() -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(coverage_table(coverage(get_peft_model(Toy(), LoraConfig(r=2, target_modules=["up"])))))
    total = console.export_text().splitlines()[-2]
    assert [cell.strip() for cell in total.split("│") if cell.strip()] == ["1 of 4 kinds", "2/6", "124", "100.0%", "40"]
