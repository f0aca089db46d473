"""Libraries that only some rooms need."""

import importlib.util


def require(*modules: str, extra: str) -> None:
    """Check that `modules` can be imported.

    Args:
        modules: Import names.
        extra: The extra of this package that installs them.

    Raises:
        ImportError: One can't; the message has the command that installs it.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f'This needs {", ".join(missing)}, not installed here. Run: pip install "gralora[{extra}]"')
