"""fsspec file system: objects of S3 and of http(s) servers as files, read by the range fetch.

``filesystem`` is the face that fsspec knows. It opens a ``file``, reads by ``slices`` and lists by ``listing``.
"""
