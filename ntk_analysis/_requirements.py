"""Looks, when the package is imported, whether what it needs came with natgrad."""

from natgrad_flax.arguments.extras import require_extra

require_extra("theory", "ntk_analysis", "diffrax", "pooch", "sklearn")
