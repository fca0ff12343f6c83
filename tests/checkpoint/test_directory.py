"""Which checkpoints a resume may go on from, whatever `latest` says."""

from pathlib import Path

import pytest

from sedd_scale.checkpoint.directory import resume_candidates


@pytest.mark.parametrize(
    ("named", "expected", "complaint"),
    [
        ("step-217\n", [217, 216], None),
        ("step-216\n", [216], None),
        # One bit off: an older step, that retention has removed.
        ("step-207\n", [218, 217, 216], "names step-207, which is missing"),
        ("step-317\n", [218, 217, 216], "names step-317, which is missing"),
        ("stop-217\n", [218, 217, 216], "not the name of a checkpoint"),
        (None, [218, 217, 216], "cannot be read"),
    ],
)
def test_a_damaged_name_hides_no_checkpoint(
    tmp_path: Path, named: str | None, expected: list[int], complaint: str | None
) -> None:
    folder = tmp_path / "checkpoints"
    for step in (216, 217, 218):
        (folder / f"step-{step}").mkdir(parents=True)
    if named is not None:
        (folder / "latest").write_text(named)
    found, said = resume_candidates(tmp_path)
    assert [int(path.name[5:]) for path in found] == expected
    assert (complaint is None and said is None) or complaint in str(said)
