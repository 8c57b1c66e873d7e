"""Reproduce a figure: a claim, its check and its verdict

Every claim of four papers is a check: the claim in the paper's sense, a setting, rows with a value
that is expected and a tolerance, and controls that must fail. One command runs it,
`natgrad reproduce KE-Fig2`; here the same by hand.
"""

# gallery: 9

# %%
# Kerekes, Mészáros & Huszár (2021) ask what depth does to a linear classifier of separable points:
# gradient descent goes to other separators as the network becomes deeper, natural-gradient descent
# to the same one whatever the depth.
import textwrap

from ntk_analysis.frame import theme
from ntk_analysis.reproduce import find_checks, load_checks
from ntk_analysis.reproduce.drawings import DRAWINGS

load_checks()
(check,) = find_checks(["KE-Fig2"])
print(check.title)
print(textwrap.fill(f"claim: {check.claim}"))
print(textwrap.fill(f"setting: {check.setting}"))

# %%
# What it measures, what was expected, and whether that fits.
outcome = check.run(lambda doing: None)
for row in outcome.measurements:
    sign = "as expected" if row.passed else "NOT as expected"
    print(f"{row.measured:>9.3g}   expected {row.expected:<12} {sign}: {row.what}")

# %%
# The figure, drawn from the data of the check, as the pages of the papers draw it from stored
# records; `figure.savefig` keeps it.
with theme():
    figure = DRAWINGS["KE-Fig2"](outcome.data)

# %%
# All papers, claims and figures: [The papers](../theory/papers.md). A claim of your own
# is [a function](../extending/check.md).
