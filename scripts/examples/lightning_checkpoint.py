"""Lightning with its checkpoints on S3: a CheckpointIO plugin for any Trainer, and ModelCheckpoint as usual.

Tensors are saved and loaded by DCP; what else Lightning keeps is one item beside them. Each run trains EPOCHS epochs
more than the last one. (Strategies that shard, FSDP's say, don't ask a CheckpointIO: see torchtitan_style.py.)

    python scripts/examples/lightning_checkpoint.py s3://bucket/run EPOCHS
"""

import io
import sys

import fsspec
import pytorch_lightning as pl
import torch
import torch.distributed.checkpoint as dcp
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.plugins import CheckpointIO
from torch.utils._pytree import tree_leaves, tree_map_only

from mpreader import S3Client
from mpreader.dcp import S3StorageWriter, load_checkpoint
from mpreader.fsspec.filesystem import RangeFileSystem


class S3CheckpointIO(CheckpointIO):
    def save_checkpoint(self, checkpoint, path, **_):
        tensors = (leaf for leaf in tree_leaves(checkpoint) if isinstance(leaf, torch.Tensor))
        torch.save(tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), checkpoint), rest := io.BytesIO())
        state = {f"tensor{index}": tensor for index, tensor in enumerate(tensors)} | {"rest": rest.getvalue()}
        dcp.save(state, storage_writer=S3StorageWriter(None, path), no_dist=True)

    def load_checkpoint(self, path, weights_only=None, **_):
        state = load_checkpoint(path)
        rest = torch.load(io.BytesIO(state.pop("rest")), weights_only=weights_only is not False)
        tensors = (state[f"tensor{index}"] for index in range(len(state)))
        return tree_map_only(torch.Tensor, lambda _: next(tensors), rest)

    def remove_checkpoint(self, path):
        for name in fsspec.filesystem("s3").find(path):
            S3Client().delete_object(*name.split("/", 1))


def main(run, epochs):
    fsspec.register_implementation("s3", RangeFileSystem, clobber=True)  # where ModelCheckpoint looks for files
    pl.seed_everything(0)
    saved = fsspec.filesystem("s3").glob(f"{run}/epochs=*.ckpt")
    first = max((int(name.rpartition("=")[2].removesuffix(".ckpt")) for name in saved), default=0)
    until = first + int(epochs)
    keep = ModelCheckpoint(run, f"epochs={until}", every_n_epochs=int(epochs), save_on_train_epoch_end=True)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=until, callbacks=keep, plugins=S3CheckpointIO(), logger=False)
    model = BoringModel()
    trainer.fit(model, ckpt_path=f"{run}/epochs={first}.ckpt" if first else None)
    weight = S3CheckpointIO().load_checkpoint(keep.best_model_path)["state_dict"]["layer.weight"]
    assert weight.equal(model.layer.weight)
    print(f"{keep.best_model_path}: {trainer.global_step} steps, sum of weights {weight.sum().item()!r}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
