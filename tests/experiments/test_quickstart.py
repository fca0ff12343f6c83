"""The tour's plan and its folder; the tour itself is `make quickstart`."""

import json
import sys
from pathlib import Path

import pytest

from sedd_scale.__main__ import main
from sedd_scale.commands import eval_ppl, generate, plot_run, prepare_data
from sedd_scale.config import Config, load_config
from sedd_scale.errors import ConfigError
from sedd_scale.experiments import quickstart
from sedd_scale.experiments.quickstart import (
    MARKER,
    OURS,
    Stage,
    StageError,
    run_stage,
    stages,
    start_over,
)

PARSERS = {
    "prepare_data": prepare_data.build_parser,
    "eval_ppl": eval_ppl.build_parser,
    "generate": generate.build_parser,
    "plot_run": plot_run.build_parser,
}


def plan(steps: int = 1000) -> dict[str, list[str]]:
    """First word of each title: the command and its arguments."""
    found = {}
    for stage in stages(Path("quickstart"), steps=steps):
        start = stage.command.index("sedd_scale")
        found[stage.title.partition(":")[0]] = stage.command[start + 1 :]
    return found


def training(name: str, steps: int) -> Config:
    """The configuration a training stage of the plan runs."""
    tool, config, *rest = plan(steps)[name]
    assert tool == "train"
    return load_config(config, [word for word in rest if "=" in word])


def test_every_stage_is_a_command_with_its_arguments():
    parsed = {
        name: PARSERS[words[0]]().parse_args(words[1:])
        for name, words in plan().items()
        if words[0] in PARSERS
    }
    assert list(plan()) == ["Prepare", "Train", "Resume", "Evaluate", "Sample", "Infill", "Plot"]
    assert parsed["Prepare"].output == Path(parsed["Evaluate"].data)
    run = parsed["Evaluate"].checkpoint
    assert run == parsed["Sample"].checkpoint == parsed["Infill"].checkpoint
    assert [run] == parsed["Plot"].runs
    assert plan()["Train"][plan()["Train"].index("--run-dir") + 1] == str(run)
    assert parsed["Sample"].num_samples == 3


@pytest.mark.parametrize("steps", [2, 9, 1000])
def test_training_is_cut_between_two_layouts_of_two_processes(steps: int):
    first, second = training("Train", steps), training("Resume", steps)
    first.validate(2)
    second.validate(2)
    assert (first.parallel.tensor, second.parallel.tensor) == (2, 1)
    assert first.data_parallel(2) == 1 and second.data_parallel(2) == 2
    assert 1 <= first.training.steps < second.training.steps == steps
    assert first.training.resume == second.training.resume == "auto"
    # All else is the same run.
    same = f"training.steps={steps}"
    assert first.override(same, "parallel.tensor=1") == second


def test_the_folder_starts_over_with_its_prompt(tmp_path: Path):
    folder = tmp_path / "deep" / "tour"
    start_over(folder)
    assert json.loads((folder / "prompts.jsonl").read_text())["text"].count("[blank:") == 2
    for name in OURS:
        if "." in name:
            (folder / name).write_text("old")
        else:
            (folder / name).mkdir()
            (folder / name / "file").write_text("old")
    start_over(folder)
    assert {entry.name for entry in folder.iterdir()} == {MARKER, "prompts.jsonl"}
    assert "old" not in (folder / "prompts.jsonl").read_text()


@pytest.mark.parametrize("marked", [False, True])
def test_a_foreign_file_is_never_removed(marked: bool, tmp_path: Path):
    if marked:
        start_over(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds (thesis\.txt|run)"):
        start_over(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "run").is_dir()


def test_a_folder_like_ours_without_the_marker_is_foreign(tmp_path: Path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ConfigError, match="holds data"):
        start_over(tmp_path)
    assert (tmp_path / "data").is_dir()


def test_a_link_is_not_followed(tmp_path: Path):
    target = tmp_path / "elsewhere"
    start_over(target)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ConfigError, match="not a directory of its own"):
        start_over(tmp_path / "link")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="not a directory of its own"):
        start_over(tmp_path / "file")
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "file").write_text("mine")
    (target / "run").symlink_to(keep)
    start_over(target)
    assert (keep / "file").read_text() == "mine"


def test_a_stage_prints_its_command_and_runs_it(capfd: pytest.CaptureFixture[str]):
    command = [sys.executable, "-c", "import os; print(os.environ['OMP_NUM_THREADS'], 'a b')"]
    output, seconds = run_stage(Stage("Try: it", command), capture=True)
    assert output == "1 a b\n" and seconds > 0
    shown = capfd.readouterr().out.splitlines()
    assert shown[:2] == ["", "# Try: it"] and shown[-1] == "1 a b"
    assert shown[2].startswith("$ ")


def test_a_stage_that_fails_is_named():
    command = [sys.executable, "-c", "import sys; sys.exit(7)"]
    with pytest.raises(StageError, match=r"try failed with exit code 7: .*sys\.exit\(7\)"):
        run_stage(Stage("Try: it", command), capture=False)


def test_a_failing_step_makes_the_command_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    failing = Stage("Prepare: text", [sys.executable, "-c", "raise SystemExit(3)"])
    monkeypatch.setattr(quickstart, "stages", lambda folder, steps: [failing])
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--output", str(tmp_path / "tour")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "prepare failed with exit code 3" in error


def test_bad_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine").write_text("")
    assert main(["quickstart", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "holds mine" in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
