"""Measurements of the commands ``bench`` and ``load``: of pool settings, of whole loads, and of the memory they take.

The demo uses the measurement of memory, too.
"""
