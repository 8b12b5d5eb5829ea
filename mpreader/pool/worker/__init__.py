"""The worker process: receives parts of objects into shared memory.

Started by :mod:`mpreader.pool.coordinator.process`. It must not import anything else of mpreader: whatever a worker
imports makes its start slower and its memory larger, and the credentials are kept by modules outside of this package.
"""
