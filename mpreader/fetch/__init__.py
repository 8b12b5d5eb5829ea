"""Range fetch: parallel reads of byte ranges of S3 objects and http(s) URLs, without torch.

``fetcher`` and ``aio`` are its public face. Both check a call's ``arguments`` and hand them to the ``engine``, which
owns the pool and the ``sources`` and makes a ``plan``. Bytes that arrive come as a ``stream``, or go into a ``result``.
"""
