"""Where the files of the repository lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
DATA = ROOT / "tests/data"
GOLDEN = DATA / "golden"  # the reference's numbers: tests/data/README.md
