"""Files and folders that are written whole or not at all, and JSON."""

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes ``path`` at the end; an error or Ctrl-C leaves nothing behind.

    It has the suffix of ``path``, because libraries choose a format by it.
    """
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def package_folder(name: str) -> Path | None:
    """The folder of an installed top-level package, of which no code is run; None where it is not there."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


MOST_JSON = 16 * 2**20  # bytes; configurations, arguments and counters have a few kB


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ValueError: When the file has no object, or is larger than any that we write; names the file.
    """
    try:
        if path.stat().st_size > MOST_JSON:
            raise ValueError(f"it has {path.stat().st_size} bytes; expected at most {MOST_JSON}")
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it has a {type(content).__name__}; expected an object with names")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {' '.join(str(error).split())}") from None
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n")


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename ``partial`` to ``folder``; what was there stays as ``*.previous`` until that is done."""
    previous = folder.with_name(folder.name + ".previous")
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)
