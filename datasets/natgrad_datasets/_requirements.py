"""Looks, when the package is imported, whether what it needs is installed."""

from importlib.util import find_spec

_missing = [name for name in ("pooch", "sklearn") if find_spec(name) is None]
if _missing:
    raise ImportError(
        f"natgrad_datasets needs {' and '.join(_missing)}, which an extra brings: "
        "pip install 'natgrad[datasets]'"
    )
