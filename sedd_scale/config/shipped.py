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
    given = Path(path)
    shipped = CONFIGS.parent / given
    if given.exists() or given.is_absolute() or given.parts[:1] != (CONFIGS.name,):
        found = given
    else:
        found = shipped
    if found.exists():
        return found
    names = sorted(str(file.relative_to(CONFIGS.parent)) for file in CONFIGS.rglob("*.yaml"))
    raise ConfigError(
        f"{path}: no such config file: check the path, or take a shipped one such as "
        f"{nearest(str(path), names)}"
    )
