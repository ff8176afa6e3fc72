"""Keep the rows of a jsonl that are at most so many tokens long as SmolLM2 reads them, prompt and answer together.

python recipes/short_problems.py gsm8k_train.jsonl short.jsonl [--tokens 160]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lorafa.data.chat import encode_all
from lorafa.data.records import Message, Record
from lorafa.models.load import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("short", type=Path)
    parser.add_argument("--tokens", type=int, default=160)
    arguments = parser.parse_args()
    _, tokenizer = load_model("smollm2-135m")
    lines = arguments.rows.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    records = [Record((Message("user", row["question"]), Message("assistant", row["answer"]))) for row in rows]
    samples = encode_all(records, tokenizer, max_length=100_000).samples
    kept = [line for line, s in zip(lines, samples, strict=True) if len(s.input_ids) <= arguments.tokens]
    arguments.short.write_text("\n".join(kept) + "\n", encoding="utf-8")
    print(f"{len(kept)} of {len(lines)} rows have at most {arguments.tokens} tokens: {arguments.short}")


if __name__ == "__main__":
    main()
