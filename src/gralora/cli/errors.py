"""Error messages of the library, respelled for the command line."""

import re
from typing import Any

# Library names of parameters that a verb calls differently. The verb's own parameters take precedence.
_SYNONYMS = {
    "gralora_k": "k",
    "gralora_dropout": "dropout",
    "use_adapter": "adapter_on",
    "model": "base",
    "resume_run": "resume",
    "output": "plot",
}
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""


def with_flags(message: str, verb: Any) -> str:
    """Return `message` with the parameters of a verb spelled as on the command line.

    The library names Python arguments: `` `name` ``, `` `name=value` ``, and "got name=value". Names that are
    not parameters of the verb are left alone.

    Args:
        message: Text of an error.
        verb: The click command that failed.
    """
    message = re.sub(r"`(\w+)(?:=([^`]+))?`", lambda match: _flag(match, verb) or match[0], message)
    # Quoted text is the user's, and stays; an apostrophe inside a word begins no quotation.
    got = rf"(?<!\w){_QUOTED}|(?<=\s)(\w+)=(?=\S)"
    return re.sub(got, lambda match: (match[1] and _got(match, verb)) or match[0], message)


def _flag(match: re.Match[str], verb: Any) -> str | None:
    parameter, value = _parameter(match[1], verb), match[2]
    if parameter is None or value is None:
        return parameter and _spelling(parameter)
    if not getattr(parameter, "is_flag", False):
        value = value.strip("\"'")
        return f"{_spelling(parameter)} {value}"
    if value == "True":
        return _spelling(parameter)
    return parameter.secondary_opts[0] if parameter.secondary_opts else None


def _got(match: re.Match[str], verb: Any) -> str | None:
    parameter = _parameter(match[1], verb)
    if parameter is None or getattr(parameter, "is_flag", False):
        return None
    return f"{_spelling(parameter)} "


def _parameter(name: str, verb: Any) -> Any:
    by_flag = {flag.lstrip("-").replace("-", "_"): parameter for parameter in verb.params for flag in parameter.opts}
    parameters = by_flag | {parameter.name: parameter for parameter in verb.params}
    return parameters.get(name) or parameters.get(_SYNONYMS.get(name))


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return parameter.name.upper()
    own = f"--{parameter.name.replace('_', '-')}"
    return own if own in parameter.opts else max(parameter.opts, key=len)
