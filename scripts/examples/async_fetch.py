"""Fetch objects within asyncio: one as a stream, in bounded memory, while the first bytes of all are asked for.

python scripts/examples/async_fetch.py s3://bucket/large s3://bucket/other …
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys

from mpreader import AsyncRangeFetcher

PART = 8 * 1024 * 1024


async def digest(fetcher: AsyncRangeFetcher, uri: str) -> str:
    size = (await fetcher.stat(uri)).size
    parts = [(start, min(start + PART, size)) for start in range(0, size, PART)]
    sha256 = hashlib.sha256()
    async with contextlib.aclosing(fetcher.stream(uri, parts, order="input")) as pieces:
        async for _, view in pieces:
            sha256.update(view)
    return sha256.hexdigest()


async def main(uris: list[str]) -> None:
    async with AsyncRangeFetcher() as fetcher:
        hexadecimal, heads = await asyncio.gather(
            digest(fetcher, uris[0]), fetcher.fetch_many({uri: [(0, 4)] for uri in uris})
        )
        print(f"sha256 {hexadecimal} {uris[0]}")
        for uri, [head] in heads.items():
            print(f"begins {head.hex()} {uri}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
