"""Where bytes are: S3 objects and http(s) URLs as sources of the pool."""
