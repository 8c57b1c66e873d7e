"""The formulas of the checks, plain text in code and on terminals, as HTML."""

from __future__ import annotations

import re

from markupsafe import Markup

_GREEK = {
    "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "eta": "η", "theta": "θ", "lambda": "λ",
    "mu": "μ", "xi": "ξ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φ", "psi": "ψ",
    "Theta": "Θ", "Xi": "Ξ", "Pi": "Π", "Sigma": "Σ", "Delta": "Δ",
}  # fmt: skip
_NAME = re.compile(rf"(?<![A-Za-z])(d?)({'|'.join(_GREEK)})(?![a-z])")
_GROUP = r"\{[^{}]*\}|\([^()]*\)"
# a symbol of one or two letters, so that names of code and files stay as they are
_BELOW = re.compile(
    r"((?<![A-Za-z_])(?:[A-Za-z]{1,2}|loss|grad|sum|prod)|d?[Α-ω]|[)\]|]|&gt;|</span>)_"
    rf"({_GROUP}|(?:max|min|inf|\d+|[A-Za-zΑ-ω])(?![A-Za-z0-9_]))"
)
_ABOVE = re.compile(rf"\^({_GROUP}|-?\d+(?:\.\d+)?|-?[A-Za-zΑ-ω](?:<sub>[^<]*</sub>)?|[-+*])")
_SIGNS = {
    "Θ-bar": '<span class="bar">Θ</span>',
    "&gt;=": "≥",
    "&lt;=": "≤",
    "!=": "≠",
    "-&gt;": "→",
    " (x) ": " ⊗ ",
    " o ": " ∘ ",
    "sum<sub>": "∑<sub>",
    "prod<sub>": "∏<sub>",
}


def typeset(text: str) -> Markup:
    """Text with Greek letters, indices, exponents and relations in place of their spelling.

    Args:
      text: such as "Theta_l^-1 >= e^(-2t)"; it is escaped.
    """
    html = str(Markup.escape(text))
    html = _NAME.sub(lambda found: found[1] + _GREEK[found[2]], html)
    html = html.replace("Θ-bar", _SIGNS["Θ-bar"])
    html = _BELOW.sub(lambda found: f"{found[1]}<sub>{_inner(found[2])}</sub>", html)
    html = _ABOVE.sub(lambda found: f"<sup>{_inner(found[1])}</sup>", html)
    for plain, sign in _SIGNS.items():
        html = html.replace(plain, sign)
    return Markup(html)


def _inner(group: str) -> str:
    """What stands in an index or an exponent, without its braces and with true minus signs."""
    if group[0] in "{(":
        group = group[1:-1]
    return {"inf": "∞"}.get(group, group.replace("-", "−"))
