"""Splits: by the text alone, in the proportions asked for, and never empty."""

import pytest

from sedd_scale.errors import DataError
from sedd_scale.preparation.documents import Document
from sedd_scale.preparation.splits import SplitRule, document_hash
from tests.data.corpus import make_texts


def split(texts: list[str], valid: float, test: float) -> dict[str, set[str]]:
    rule = SplitRule(valid, test)
    rule.fit(Document(text, "") for text in texts)
    found: dict[str, set[str]] = {name: set() for name in rule.names}
    for text in texts:
        found[rule.split_of(document_hash(text))].add(text)
    return found


def test_proportions() -> None:
    texts = [f"document {number}" for number in range(20_000)]
    found = split(texts, 0.1, 0.05)
    assert abs(len(found["valid"]) / 20_000 - 0.1) < 0.01
    assert abs(len(found["test"]) / 20_000 - 0.05) < 0.01


def test_a_document_keeps_its_split_when_others_come() -> None:
    texts = [f"document {number}" for number in range(2_000)]
    few, many = split(texts[:1000], 0.1, 0.0), split(texts[::-1], 0.1, 0.0)
    assert few["valid"] == many["valid"] & set(texts[:1000])


@pytest.mark.parametrize("count", range(3, 12))
@pytest.mark.parametrize(("valid", "test"), [(0.02, 0.0), (0.02, 0.02), (0.6, 0.3), (0.3, 0.6)])
def test_no_split_is_empty(count: int, valid: float, test: float) -> None:
    for seed in range(20):
        found = split(make_texts(count, seed=seed), valid, test)
        assert all(found.values())
        assert sum(map(len, found.values())) == count


def test_the_smallest_hash_validates_where_none_would() -> None:
    texts = ["one", "two", "three"]
    found = split(texts, 1e-9, 0.0)
    assert found["valid"] == {min(texts, key=document_hash)}


def test_too_few_documents() -> None:
    with pytest.raises(DataError, match=r"1 distinct document\(s\) are too few"):
        split(["same", "same", "  "], 0.02, 0.0)
    with pytest.raises(DataError, match="holds no text"):
        split([" ", "\n"], 0.02, 0.0)
    assert split(["one"], 0.0, 0.0) == {"train": {"one"}}
