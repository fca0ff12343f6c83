"""What a prepared dataset holds, as tables."""

import math
from typing import Any


def format_report(index: dict[str, Any]) -> str:
    """A table of the splits: counts, tokenizer efficiency and unigram entropy.

    Bits/character are the unigram entropy of all tokens spread over the documents' characters.
    """
    rows = [
        ("documents", lambda split: f"{split['documents']:,}"),
        ("tokens", lambda split: f"{split['tokens']:,}"),
        ("blocks", lambda split: f"{split['blocks']:,}"),
        ("padding tokens", lambda split: f"{split['padding_tokens']:,}"),
        ("dropped tokens", lambda split: f"{split['dropped_tokens']:,}"),
        ("shards", lambda split: f"{len(split['shards']):,}"),
        ("characters", lambda split: f"{split['characters']:,}"),
        ("bytes/token", lambda split: f"{split['utf8_bytes'] / split['tokens']:.3f}"),
        ("unknown tokens", lambda split: f"{split['unknown_tokens'] / split['tokens']:.4%}"),
        ("unigram nats/token", lambda split: f"{split['unigram_entropy_nats']:.4f}"),
        ("unigram bits/char", lambda split: f"{unigram_bits_per_character(split):.4f}"),
    ]
    splits: dict[str, dict[str, Any]] = index["splits"]
    lines = [
        f"tokenizer {index['tokenizer']['kind']}, {index['vocab_size']:,} tokens, "
        f"blocks of {index['block_length']}, packing {index['packing']}",
        f"{'':20}" + "".join(f"{name:>16}" for name in splits),
    ]
    for title, value in rows:
        lines.append(f"{title:20}" + "".join(f"{value(split):>16}" for split in splits.values()))
    lines += ["", *_length_lines(splits)]
    if index["duplicates_dropped"] is not None:
        lines += ["", f"{index['duplicates_dropped']:,} duplicate documents dropped"]
    lines += [f"{count:,} {what}" for what, count in index.get("notes", {}).items()]
    return "\n".join(lines)


def _length_lines(splits: dict[str, dict[str, Any]]) -> list[str]:
    """How many documents of each split have how many tokens, in powers of two."""
    tables = [split["documents_by_length"] for split in splits.values()]
    rows = range(max(map(len, tables)))
    lines = ["documents by tokens"]
    for row in rows:
        counts = [table[row] if row < len(table) else 0 for table in tables]
        if any(counts):
            title = f"{2**row - 1:,} to {2 ** (row + 1) - 2:,}"
            lines.append(f"{title:>20}" + "".join(f"{count:>16,}" for count in counts))
    return lines


def unigram_bits_per_character(split: dict[str, Any]) -> float:
    """The unigram entropy of a split's entry in the index, in bits per character of its text."""
    nats = float(split["unigram_entropy_nats"]) * split["tokens"]
    return nats / split["characters"] / math.log(2)
