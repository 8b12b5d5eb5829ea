"""Sources: the objects that the pool reads, by URI; their versions, and the routes on which workers reach them.

They live in the main process and hold its credentials; the workers get routes only. Above :mod:`mpreader.s3` and the
pool, which know nothing of them.
"""
