"""Names that a user gives, found or refused with the nearest one: those of ``ntk_analysis``."""

from ntk_analysis.names import find

__all__ = ["find"]
