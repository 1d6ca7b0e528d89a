"""Print what the image installs before memfit itself: its dependencies and those of some extras, from pyproject.toml.

python requirements.py pyproject.toml cpu|cuda EXTRA[,EXTRA...]
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

RUNTIMES = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}
"""One of them, never both: they hold the same module."""
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_OWN = re.compile(r"memfit\[(.*)\]")


def requirements(project: dict[str, object], target: str, extras: list[str]) -> Iterator[str]:
    """Yield requirements of memfit and of its extras, with the onnxruntime that the target wants."""
    optional = project["optional-dependencies"]
    lists = [project["dependencies"]]
    while extras:
        extra, *extras = extras
        if extra not in optional:
            sys.exit(f"EXTRAS: expected some of {', '.join(optional)}, got {extra!r}.")
        own = [match[1].split(",") for match in map(_OWN.fullmatch, optional[extra]) if match]
        extras += [name for names in own for name in names]
        lists.append([line for line in optional[extra] if not _OWN.fullmatch(line)])
    for line in dict.fromkeys(line for lines in lists for line in lines):
        name = _NAME.match(line)[0]
        yield RUNTIMES[target] + line[len(name) :] if name == "onnxruntime" else line


if __name__ == "__main__":
    path, wanted, chosen = sys.argv[1:]
    document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    sys.stdout.writelines(f"{line}\n" for line in requirements(document["project"], wanted, chosen.split(",")))
