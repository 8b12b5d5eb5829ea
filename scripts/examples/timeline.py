"""Draw when each request of each connection ran while an object was fetched; ``.json`` makes a trace instead.

python scripts/examples/timeline.py s3://bucket/key timeline.png
"""

from __future__ import annotations

import sys

from mpreader import RangeFetcher
from mpreader.telemetry.timeline import record_timeline

PART = 1024 * 1024


def main(uri: str, picture: str) -> None:
    with record_timeline() as timeline, RangeFetcher() as fetcher:
        size = fetcher.stat(uri).size
        parts = [(start, min(start + PART, size)) for start in range(0, size, PART)]
        received = sum(len(view) for _, view in fetcher.stream(uri, parts))
    timeline.save(picture)
    print(f"{received} bytes received, drawn in {picture}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
