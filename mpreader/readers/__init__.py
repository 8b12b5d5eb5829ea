"""Readers: read-only files over one S3 object each, and the constructors that make them for the storage readers."""
