"""Train, save and resume as torchtitan's CheckpointManager does: a dict of Stateful objects in folders ``step-N``.

Each run makes STEPS more: ``python scripts/examples/torchtitan_style.py s3://bucket/run STEPS``
"""

import sys

import fsspec
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states

from mpreader.dcp import S3StorageReader, S3StorageWriter

FLAT = states.StateDictOptions(flatten_optimizer_state_dict=True)


class ModelWrapper:
    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict:
        return states.get_model_state_dict(self.model)

    def load_state_dict(self, state: dict) -> None:
        states.set_model_state_dict(self.model, state)


class OptimizerWrapper:
    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict:
        return states.get_optimizer_state_dict(self.model, self.optimizer, options=FLAT)

    def load_state_dict(self, state: dict) -> None:
        states.set_optimizer_state_dict(self.model, self.optimizer, state, options=FLAT)


def main(run: str, steps: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    objects = {"model": ModelWrapper(model), "optimizer": OptimizerWrapper(model, optimizer)}
    saved = fsspec.filesystem("mpreader").glob(f"{run}/step-*/.metadata")  # it is written last
    first = max((int(name.split("/")[-2].removeprefix("step-")) for name in saved), default=0)
    if first:
        dcp.load(objects, storage_reader=S3StorageReader(None, f"{run}/step-{first}"))
    for step in range(first, first + int(steps)):
        inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    dcp.save(objects, storage_writer=S3StorageWriter(None, f"{run}/step-{step + 1}"))
    print(f"from step {first} to {step + 1}: loss {loss.item()!r}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
