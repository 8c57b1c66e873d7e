"""One workload a file, called ``WORKLOAD``, or several small ones, ``WORKLOADS``.

A changed workload is a new version of it, and its target is frozen anew.
"""
