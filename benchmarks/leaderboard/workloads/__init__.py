"""One workload a file, called ``WORKLOAD``; a file more is a workload more.

A changed workload is a new version of it, and its target is frozen anew.
"""
