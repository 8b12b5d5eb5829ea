"""The doctor: what is wrong with a host's set-up, and what mends it."""
