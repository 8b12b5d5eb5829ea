"""The command bench: the fastest settings for this host and this bucket."""
