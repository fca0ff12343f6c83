"""The configurations that come with the program: configs/... is found from any folder."""

from pathlib import Path

from sedd_scale.cli import nearest
from sedd_scale.errors import ConfigError
from sedd_scale.files.package import CONFIGS


def find_config(path: str | Path) -> Path:
    """The file at `path`, or the shipped one of that name, such as configs/runs/tiny.yaml.

    A file that exists comes first.

    Raises:
        ConfigError: there is neither; names the nearest shipped ones.
    """
    found = _there(Path(path), path)
    if found is not None:
        return found
    names = sorted(str(file.relative_to(CONFIGS.parent)) for file in CONFIGS.rglob("*.yaml"))
    raise ConfigError(
        f"{path}: no such config file: check the path, or take a shipped one such as "
        f"{nearest(str(path), names)}"
    )


def find_base(file: Path, base: str) -> Path:
    """The file that `base:` of `file` names: relative to `file`, or a shipped one.

    Raises:
        ConfigError: there is neither.
    """
    found = _there(file.parent / base, base)
    if found is not None:
        return found
    raise ConfigError(
        f"{file}: base={base}: no such file: give a path relative to {file.parent}, or a shipped "
        "one such as configs/models/tiny.yaml"
    )


def _there(given: Path, name: str | Path) -> Path | None:
    """The file `given`, else the shipped one that is called `name`, else None."""
    if given.exists():
        return given
    shipped = CONFIGS.parent / name
    is_shipped = Path(name).parts[:1] == (CONFIGS.name,) and shipped.exists()
    return shipped if is_shipped else None
