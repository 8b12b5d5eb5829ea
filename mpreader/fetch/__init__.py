"""Range fetch: parallel reads of byte ranges of S3 objects and http(s) URLs, without torch.

``fetcher`` and ``aio`` hold the public classes, for threads and for asyncio. Both check the ``arguments`` of a call and
pass them to the ``engine``, which owns the worker pool and the ``sources`` and makes a ``plan``. The bytes that arrive
are handed out one after the other as a ``stream``, or are collected in a ``result``.
"""
