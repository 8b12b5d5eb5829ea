"""Measurements of the commands ``bench`` and ``load``: settings, whole loads, and the memory that they take."""
