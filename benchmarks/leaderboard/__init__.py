"""The leaderboard: optimizers against frozen targets, natural-gradient ones at their own rates.

``python -m benchmarks.leaderboard run`` runs trials into a folder, ``score`` prints the ranking of
what is there, ``page`` writes it as one HTML page; benchmarks/README.md says the rest.
"""

RULES = "1.2"
"""The one version of the rules, the code and the board: what it differs in is not comparable."""
