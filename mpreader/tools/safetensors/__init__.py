"""Tools for safetensors files, behind the commands: telling them from DCP checkpoints, descriptions, timed loads."""
