"""Packages that come with an extra of natgrad, and not with natgrad alone."""

from __future__ import annotations

from importlib.util import find_spec


class MissingExtraError(ImportError):
    """A package is not installed; says which command installs it."""


def require_extra(extra: str, what: str, *modules: str) -> None:
    """Raises MissingExtraError unless modules can be imported; none of them is.

    Args:
      extra: that brings them, as in ``pip install 'natgrad[extra]'``.
      what: needs them, for the message.
      modules: their top-level names.

    Example:
      >>> from natgrad_flax.arguments.extras import require_extra
      >>> require_extra("report", "the command natgrad", "no_such_module")
      Traceback (most recent call last):
        ...
      natgrad_flax.arguments.extras.MissingExtraError: the command natgrad needs no_such_module...
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{what} needs {', '.join(missing)}, which come{'s' * (len(missing) == 1)} with an "
            f"extra: pip install 'natgrad[{extra}]'"
        )
