"""fsspec file system: objects of S3 and of http(s) servers as files, read by the range fetch.

``filesystem`` holds the class that fsspec uses, and draws the parts that it is made of. Open files are in ``file``,
reading in ``slices``, and the listing of buckets in ``listing``.
"""
