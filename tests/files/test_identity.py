"""Unfinished work belongs to what it was begun with."""

from pathlib import Path

import pytest

from sedd_scale.errors import ConfigError, DataError
from sedd_scale.files.identity import claim

WORDS = {"holds": "the folder holds work", "remedy": "give the same command"}


def test_the_same_identity_may_continue_and_another_is_named(tmp_path: Path) -> None:
    path = tmp_path / "identity.json"
    claim(path, {"seed": 1, "files": ("a", "b")}, **WORDS)
    claim(path, {"seed": 1, "files": ["a", "b"]}, **WORDS)  # as JSON has it
    for identity, message in (
        ({"seed": 2, "files": ["a", "b"]}, r"work with another seed \(1, now 2\): give the same"),
        ({"seed": 1, "files": ["a"]}, "another files:"),
        ({"files": ["a", "b"], "steps": 3}, r"seed \(1, now None\), steps \(None, now 3\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            claim(path, identity, **WORDS)
    path.write_text("[1]")
    with pytest.raises(DataError, match="is damaged: remove"):
        claim(path, {"seed": 1}, **WORDS)
