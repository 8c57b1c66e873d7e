"""natgrad and its peers on the same weights and batch: do they agree, and which is faster?

A peer runs in a process of its own, with the Python of its own environment where its pins disagree
with ours, so nothing here imports it but its worker. ``python -m benchmarks.peer_comparison`` runs
the whole comparison; ``benchmarks.peers`` is the asv suite.

From the bottom: ``exchange`` is what both sides read and write (NumPy only); ``torch_network``,
``with_curvlinops``, ``with_nngeometry`` and ``with_kfac_jax`` run in a worker, ``worker`` is its
loop; ``environments`` finds a Python that has the peer, ``client`` speaks to a worker; ``ours`` is
natgrad's side; ``comparisons`` says what is compared, in which convention and to which tolerance;
``measure`` does it and ``tables`` writes it down.
"""
