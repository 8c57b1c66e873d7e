"""Looks, when the commands are imported, whether what they need came with natgrad."""

from natgrad_flax.arguments.extras import require_extra

require_extra(
    "report", "the command natgrad",
    "typer", "threadpoolctl", "matplotlib", "seaborn", "pandas", "jinja2",
)  # fmt: skip
