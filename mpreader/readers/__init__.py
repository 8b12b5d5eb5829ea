"""File-like readers of one S3 object, and the constructors that make them."""
