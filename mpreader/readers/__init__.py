"""Readers: read-only files over one S3 object each, and the constructors that make them for DCP's storage readers.

All readers derive from :mod:`mpreader.readers.base`. ``sequential`` and ``ranged`` read any bytes of an object.
``dcp_optimized`` and ``multiprocess`` read the items of a load plan, which their constructors (``constructor``,
``read_ahead``) are given first. Users get the constructors from ``kinds``, by name.
"""
