"""Lets lm-evaluation-harness's own command find the model `sedd_scale`.

The harness looks models up in a table of its own and asks no other package. `python -m sedd_scale
lm-eval on` puts a line into this environment's site-packages, which Python runs when it starts:
then `lm_eval --model sedd_scale` works as `python -m sedd_scale.evaluation.harness` does. The line
costs a few milliseconds of every start; `lm-eval off` takes it out again.
"""

import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from sedd_scale.errors import ConfigError

# What fills the harness's table.
_TABLE = "lm_eval.models"
_MODEL, _CLASS = "sedd_scale", "sedd_scale.evaluation.harness:SeddScaleLM"
# Whatever becomes of the package, no start of Python may fail by it.
_LINE = (
    'import importlib.util; importlib.util.find_spec("sedd_scale") and '
    '__import__("sedd_scale.evaluation.harness_hook", fromlist=["install"]).install()\n'
)


class _Finder(MetaPathFinder):
    """Finds the harness's table as others do, and adds our model once it is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        registry = sys.modules["lm_eval.api.registry"].model_registry
        if _MODEL not in registry:
            registry.register(_MODEL, target=_CLASS)


def install() -> None:
    """Have the model added when this process imports the harness's table."""
    sys.meta_path.insert(0, _Finder())


def line_file() -> Path:
    """The file of this environment that holds the line."""
    return Path(sysconfig.get_path("purelib"), "sedd_scale_lm_eval.pth")


def switch(on: bool) -> str:
    """Write the line or take it out; what was done, in one line.

    Raises:
        ConfigError: the environment cannot be written to.
    """
    path = line_file()
    try:
        if on:
            path.write_text(_LINE, encoding="utf-8")
            return f"wrote {path}: lm_eval --model {_MODEL} works in this environment"
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}): make an environment of your own, or use "
            "python -m sedd_scale.evaluation.harness instead of lm_eval"
        ) from None
    return f"{path} is not there: lm_eval knows its own models alone"
