"""The configuration reference as Markdown, from the dataclasses themselves.

python -m sedd_scale.config.reference > docs/configuration.md
"""

from collections.abc import Iterator
from dataclasses import Field, fields
from typing import Any

from sedd_scale.config.rules import LIMITS
from sedd_scale.config.tree import sections
from sedd_scale.config.yaml_text import scalar_text

INTRODUCTION = """\
# Configuration

A run is described by one tree of sections and keys. A YAML file gives some of them; `base:` names
files that come first: one or a list, relative to the file, or shipped ones such as
`configs/models/tiny.yaml`. What no file gives has the default below. On the command line
`section.key=value` comes over all files:

```sh
torchrun --nproc-per-node 2 -m sedd_scale train configs/runs/tiny.yaml --run-dir runs/first \\
  data.path=data/books training.steps=200 parallel.tensor=2
```

An unknown key is refused with the nearest known one, and a combination that cannot run with the
keys, their values and the fix, before any process group starts. The run directory's `config.yaml`
holds the whole tree as it was resolved.

This page is written by `python -m sedd_scale.config.reference`.
"""


def reference() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_tables()])


def _tables() -> Iterator[str]:
    for section, section_type in sections():
        yield f"## {section.name}\n\n{section.metadata['sentence']}\n"
        yield "| key | default | values | |\n|---|---|---|---|"
        for key in fields(section_type):
            default, sentence = scalar_text(key.default), key.metadata["sentence"]
            yield (
                f"| `{section.name}.{key.name}` | `{default}` | {allowed(key)} "
                f"| {sentence.replace('|', chr(92) + '|')} |"
            )
        yield ""


def allowed(key: Field[Any]) -> str:
    """The values a key takes, in words."""
    if key.metadata["choices"]:
        return ", ".join(f"`{scalar_text(choice)}`" for choice in key.metadata["choices"])
    kind = str(getattr(key.type, "__name__", key.type))
    names = {"int": "integer", "float": "number", "bool": "`true`, `false`", "str": "text"}
    names |= {"list[typing.Any]": "list"}
    words = " or ".join(
        "`null`" if part == "None" else names[part] for part in kind.replace(" ", "").split("|")
    )
    limits = [f"{LIMITS[name][0]} {limit}" for name, limit in key.metadata["limits"].items()]
    return ", ".join([words, *limits])


if __name__ == "__main__":
    print(reference(), end="")
