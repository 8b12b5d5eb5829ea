"""Converters between DCP checkpoints and safetensors files. Users import them from :mod:`mpreader.safetensors`."""
