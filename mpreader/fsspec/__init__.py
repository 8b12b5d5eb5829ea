"""The fsspec file system over the range fetch."""
