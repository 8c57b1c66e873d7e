"""SOAP: Adam in the eigenbasis of Shampoo (Vyas et al. 2024)."""

import natgrad_flax as ng
from benchmarks.leaderboard.schedules import as_far_as_adam

CONTESTANTS = (as_far_as_adam("soap-cosine", "SOAP, cosine", "natural-gradient", ng.soap),)
