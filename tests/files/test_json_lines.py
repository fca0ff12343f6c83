"""Lines that a killed process left unfinished are passed over."""

from pathlib import Path

from sedd_scale.files.json_lines import read_json_lines


def test_whole_objects_are_read_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert list(read_json_lines(path)) == []
    path.write_bytes(b'{"step": 1}\n\n{"st\n[1]\n{"step": 2, "text": "\xff"}\n{"step": 3}\n{"step"')
    assert [record["step"] for record in read_json_lines(path)] == [1, 2, 3]
