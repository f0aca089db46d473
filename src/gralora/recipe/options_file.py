"""Options of `gralora train` in a YAML file."""

import difflib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin

from gralora.optional import require
from gralora.recipe.options import TrainingOptions

_TYPE_NAMES = {
    int: "an int",
    float: "a float",
    str: "text",
    bool: "true or false",
    tuple: "text or a list of texts",
    dict: "a mapping",
}
_COMMENT = "# gralora train --config THIS_FILE --output NEW_FOLDER\n"
# Options that hold names separated by commas.
_LISTS = ("target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers_to_transform")
_PATTERNS = ("rank_pattern", "alpha_pattern", "k_pattern")


class _RepeatedKey(Exception):
    """A mapping of a YAML file has a key twice."""


def _strict_loader() -> Any:
    """Return PyYAML's safe loader, which would silently keep the last of repeated keys, with a check for them."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            merge = "tag:yaml.org,2002:merge"
            keys = [self.construct_object(key, deep=True) for key, _ in pairs if key.tag != merge]
            for key in keys:
                if keys.count(key) > 1:
                    raise _RepeatedKey(key)
            return super().construct_mapping(node, deep)

    return StrictLoader


def option_types() -> dict[str, type]:
    """Return the type of each option by name: int, float, str, bool, tuple (of texts) or dict."""
    types = {}
    for field in fields(TrainingOptions):
        annotation: Any = field.type
        if get_origin(annotation) not in (tuple, dict) and get_args(annotation):
            annotation = get_args(annotation)[0]
        types[field.name] = get_origin(annotation) or annotation
    return types


def read_options_file(path: str) -> dict[str, Any]:
    """Return the options in a YAML file, by field name of `TrainingOptions`, and `resume` and `processes`.

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
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_strict_loader())
    except _RepeatedKey as error:
        raise ValueError(f"`config` must name an option once; got {error.args[0]!r} twice in {path!r}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`config` must be a YAML file; {path!r} is not: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"`config` must map names to values; {path!r} holds a {type(content).__name__}.")
    types = option_types() | {"resume": bool, "processes": int}
    options = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        name = "r" if name == "rank" else name
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"Nearest: {near[0]!r}." if near else "`gralora train --help` lists them."
            raise ValueError(
                f"`config` must hold options of `gralora train`; got {key!r} in {path!r}. {hint} Fields of TRL's "
                "SFTConfig go under `trainer`."
            )
        if name in options:
            raise ValueError(f"`config` must name an option once; got {key!r} twice in {path!r}.")
        if value is not None:
            options[name] = _converted(name, value, types[name], path)
    return options


def to_yaml(options: Mapping[str, Any]) -> str:
    """Return the text of a YAML file with `options`, for `read_options_file`; what is not set is left out."""
    import yaml

    content = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if value is not None and value not in ((), {}, [])
    }
    return _COMMENT + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` updated with `over`; `steps` and `epochs` replace each other.

    Example:
        >>> overlay({"epochs": 3, "r": 8}, {"steps": 10})
        {'r': 8, 'steps': 10}
    """
    hidden = {"steps", "epochs"} if {"steps", "epochs"} & set(over) else set()
    return {**{name: value for name, value in base.items() if name not in hidden}, **over}


def _converted(name: str, value: Any, wanted: type, path: str) -> Any:
    if name in _PATTERNS and isinstance(value, dict):
        return tuple(f"{module}={number}" for module, number in value.items())
    if name in _LISTS and isinstance(value, list):
        return ",".join(map(str, value))
    if name == "layers_to_transform" and type(value) is int:
        return str(value)
    if wanted is tuple and isinstance(value, str):
        return (value,)
    if wanted is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        # YAML reads 1e-4, which has no point, as text.
        with suppress(ValueError):
            return float(value)
    if type(value) is not wanted:
        raise ValueError(f"{path!r} must have {_TYPE_NAMES[wanted]} for {name}; got {value!r}.")
    return value
