"""Options of `gralora train` from a YAML file."""

import difflib
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from gralora.optional import require
from gralora.recipe.options import TrainingOptions


def read_options_file(path: str) -> dict[str, Any]:
    """Return the options in a YAML file, by field name of `TrainingOptions`, and `resume`.

    In the file, hyphens may stand for underscores.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not YAML or not a mapping, or has an unknown name or a value of the wrong type.
    """
    require("yaml", extra="train")
    import yaml

    if not Path(path).is_file():
        raise FileNotFoundError(f"`config` must be a YAML file; there is no {path!r}.")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`config` must be a YAML file; {path!r} is not: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"`config` must map names to values; {path!r} holds a {type(content).__name__}.")
    types = {field.name: (get_args(field.type) or (field.type,))[0] for field in fields(TrainingOptions)}
    types["resume"] = bool
    options = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1, cutoff=0)
            raise ValueError(
                f"`config` must hold options of `gralora train`; got {key!r} in {path!r}. Nearest: {near[0]!r}."
            )
        if name in options:
            raise ValueError(f"`config` must name an option once; got {key!r} twice in {path!r}.")
        if value is not None:
            options[name] = _converted(name, value, types[name], path)
    return options


def overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `over`; `steps` and `epochs` replace each other.

    Example:
        >>> overlay({"epochs": 3, "r": 8}, {"steps": 10})
        {'r': 8, 'steps': 10}
    """
    hidden = {"steps", "epochs"} if {"steps", "epochs"} & set(over) else set()
    return {**{name: value for name, value in base.items() if name not in hidden}, **over}


def _converted(name: str, value: Any, wanted: type, path: str) -> Any:
    if name == "target_modules" and isinstance(value, list):
        return ",".join(map(str, value))
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        # YAML reads 1e-4, which has no point, as text.
        with suppress(ValueError):
            return float(value)
    if type(value) is not wanted:
        raise ValueError(f"`{name}` must be of type {wanted.__name__}; got {name}={value!r} in {path!r}.")
    return value
