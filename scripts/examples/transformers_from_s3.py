"""A transformers model straight from safetensors files on S3: made on ``meta``, without memory, and filled there.

The model here is a small random one, which is saved to several files and uploaded first; the one that is loaded must
give the same numbers. Tied weights, of which only one is in the files, are tied as before.

    python scripts/examples/transformers_from_s3.py s3://bucket/model
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from mpreader import RangeFetcher, S3Client
from mpreader.safetensors import load_checkpoint


def load_model(uri: str) -> PreTrainedModel:
    with RangeFetcher() as fetcher:
        described = json.loads(bytes(fetcher.fetch_object(f"{uri}/config.json")))
    config = AutoConfig.for_model(described.pop("model_type"), **described)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    load_checkpoint(uri, out=model)
    make_other_buffers(model)
    return model.eval()


def make_other_buffers(model: PreTrainedModel) -> None:
    """Make what is never saved, such as the frequencies of rotary embeddings: a new module of the same kind has it."""
    for module in model.modules():
        missing = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        made = type(module)(model.config) if missing else module
        for name in missing:
            setattr(module, name, made.get_buffer(name))


def upload(model: PreTrainedModel, uri: str) -> None:
    client, (bucket, _, prefix) = S3Client(), uri.removeprefix("s3://").partition("/")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="100KB")
        for file in Path(folder).iterdir():
            with client.put_object(bucket, f"{prefix}/{file.name}") as writer:
                writer.write(file.read_bytes())


def main(uri: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    saved = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=500, tie_word_embeddings=True, **sizes)).eval()
    upload(saved, uri)
    loaded, tokens = load_model(uri), torch.arange(12)[None]
    is_same = torch.equal(loaded(tokens).logits, saved(tokens).logits)
    print(f"{loaded.num_parameters()} parameters, the same numbers: {is_same}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
