"""Start as torchtitan does from Hugging Face weights: a model on ``meta``, sharded by FSDP2, filled by DCP from S3.

Each of two ranks (forks here, not of torchrun) takes its own rows; together they receive each byte once. Names are
mapped as by torchtitan's adapters. Run it by ``python scripts/examples/torchtitan_from_hf.py s3://bucket/model``
"""

import sys
import tempfile
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard

from mpreader.dcp import S3HuggingFaceStorageReader

RANKS, WIDTH, TOKENS = 2, 64, 100
HF_NAMES = {"embeddings": "model.embed_tokens", "layers": "model.layers", "up": "mlp.up_proj", "down": "mlp.down_proj"}


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(self.up(hidden).relu())


def hf_name(name: str) -> str:
    return ".".join(HF_NAMES.get(part, part) for part in name.split("."))


def make_model() -> torch.nn.Module:
    first, last = torch.nn.Embedding(TOKENS, WIDTH), torch.nn.Linear(WIDTH, TOKENS)
    layers = torch.nn.Sequential(Layer(), Layer())
    return torch.nn.Sequential(OrderedDict(embeddings=first, layers=layers, lm_head=last))


def main(rank: int, uri: str, meeting_place: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=RANKS)
    with torch.device("meta"):
        model = make_model()
    for part in (*model.layers, model):
        fully_shard(part)
    model.to_empty(device="cpu")
    state = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    with S3HuggingFaceStorageReader(None, uri) as reader:
        dcp.load(state, storage_reader=reader)  # into the model's own memory
        loss = torch.nn.functional.cross_entropy(model(torch.arange(TOKENS)), torch.arange(TOKENS))
        if not rank:
            print(f"loss {loss.item():.5f}, {reader.host_stats.bytes} bytes received for {RANKS} ranks")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(main, (sys.argv[1], f"{folder}/ranks"), RANKS, start_method="fork")
