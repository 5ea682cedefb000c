"""A function in a user's own file, named ``path/to/file.py:function``: a reward or a policy."""

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

from vla_envs.inputs import in_short, nearest


def load_function(name: str, kind: str) -> Callable[..., Any]:
    """The function behind ``path/to/file.py:function``.

    The file is the user's own Python code and is run as such; it may import the files beside it.

    Args:
        name: The file and the function in it.
        kind: What the function is, for messages: ``"reward"`` or ``"policy"``.

    Raises:
        ValueError: When there is no such file or function, or the file does not run.
    """
    path, _, function = name.rpartition(":")
    if not os.path.isfile(path):  # of names that cannot be, False too
        raise ValueError(f"{kind} file {in_short(path)} does not exist; expected 'path/to/file.py:function'")
    spec = importlib.util.spec_from_file_location(f"user_{kind}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    folder = os.path.dirname(os.path.abspath(path))
    sys.path.insert(0, folder)  # it may import what lies beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{kind} file {path!r} does not run: {words}; expected Python code") from error
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # what the function itself imports lies beside it, too
    if not callable(getattr(module, function, None)):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ValueError(
            f"{kind} file {path!r} has no function {function!r}; expected one of"
            f" {in_short(names)}{nearest(function, names)}"
        )
    return getattr(module, function)
