"""Formats of stored tensors: what lies in a file, apart from where its bytes come from and where they go."""
