"""The ranks of a host as callers of one coordinator: one of them leads, and receives for all."""
