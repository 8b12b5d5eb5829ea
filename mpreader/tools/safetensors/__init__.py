"""What the commands do with safetensors files: tell them from DCP checkpoints, describe them, load them."""
