"""Sources: the objects that the pool reads, with their versions, and the routes by which workers request them.

Used by fetchers, readers and the commands. Sources live in the main process and hold its credentials; only routes are
sent to workers. The package may import :mod:`mpreader.s3` and the pool, which must not import it.
"""
