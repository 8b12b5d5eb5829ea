"""Checkpoints of the benchmark: written once, by torch, into the folder that the servers serve.

Contenders that read local files read the same folder. A manifest beside the files holds shapes and checksums, with
which the results of loads and fetches are checked.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from cells import TENSORS
from isal import isal_zlib
from safetensors.torch import save_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

__all__ = ["BUCKET", "TINY", "Checkpoint", "checkpoint_of", "make_checkpoints"]

BUCKET: Final = "bench"
TINY: Final = "tiny"  # loaded once before each measurement; see loads.warm_up
_VERSION: Final = 1  # of the checkpoints; data folders with another one are written anew
_HIDDEN: Final = 2048
_VOCABULARY: Final = 48_000
_THREADS: Final = {"a": 4, "small": 64, "ranks": 4}  # each writes a file of its own
_COPIES: Final = 20
_SAVING_RANKS: Final = 3  # of the checkpoint "ranks3"
_MANIFEST: Final = "manifest.json"
_TENSOR_FILES: Final = {"safetensors": 3, "safetensors-many": 1}  # checkpoints of so many safetensors files


class Checkpoint:
    """A checkpoint on the disk.

    Attributes:
        folder: Folder of its files.
        shapes: Shapes of its tensors, which are f32 in safetensors files, and else bf16.
        crcs: CRC-32s of their bytes.
    """

    def __init__(self, folder: Path) -> None:
        manifest = json.loads((folder / _MANIFEST).read_text())
        self.folder = folder
        self.shapes: dict[str, list[int]] = manifest["shapes"]
        self.crcs: dict[str, int] = manifest["crcs"]

    @property
    def files(self) -> dict[str, int]:
        """Sizes of the files that hold tensors, by their keys in the bucket."""
        files = sorted(file for file in self.folder.iterdir() if file.suffix in (".distcp", ".safetensors"))
        return {f"{self.folder.name}/{file.name}": file.stat().st_size for file in files}

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors of a checkpoint of safetensors files."""
        return sum(4 * math.prod(shape) for shape in self.shapes.values())

    def shapes_for(self, workload: str) -> dict[str, list[int]]:
        """Shapes of the tensors that a workload loads."""
        names = list(self.shapes)[::2] if workload == "c" else list(self.shapes)
        return {name: self.shapes[name] for name in names}


def checkpoint_of(workload: str) -> str:
    """Name of the checkpoint that a workload reads."""
    if workload in TENSORS:
        return "safetensors-many" if workload == "many" else "safetensors"
    return (
        workload if workload in ("a", "b", "d", "big", "small") else "a"
    )  # c loads half of (a), fetches read its files


def make_checkpoints(data: Path, names: set[str]) -> None:
    """Write the checkpoints that ``data`` lacks, each in a process of its own: torch must start no threads here."""
    for name in sorted(names | {TINY}):
        folder = data / BUCKET / name
        if _is_written(folder):
            continue
        print(f"writing checkpoint {name} to {folder} …", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        writer = multiprocessing.get_context("spawn").Process(target=_write, args=(name, folder))
        writer.start()
        writer.join()
        if writer.exitcode != 0:
            raise RuntimeError(f"checkpoint {name} could not be written")


def _is_written(folder: Path) -> bool:
    manifest = folder / _MANIFEST
    return manifest.exists() and json.loads(manifest.read_text()).get("version") == _VERSION


def _write(name: str, folder: Path) -> None:
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
    for file in folder.iterdir():
        file.unlink()
    generator = torch.Generator().manual_seed(sum(name.encode()))  # another one for each checkpoint
    state = {key: _random_bits(shape, generator) for key, shape in _shapes(name).items()}
    if name in _TENSOR_FILES:
        state = _save_tensor_files(state, folder, _TENSOR_FILES[name])
    elif name == "ranks3":
        _save_in_shards(state, folder)
    else:
        save(state, storage_writer=FileSystemWriter(folder, thread_count=_THREADS.get(name, 1), sync_files=False),
             no_dist=True)  # fmt: skip
    if name == "big":
        state = _multiply(folder, state["tensor"])
    manifest = {
        "version": _VERSION,
        "shapes": {key: list(tensor.shape) for key, tensor in state.items()},
        "crcs": {key: isal_zlib.crc32(tensor.view(torch.uint8).numpy()) for key, tensor in state.items()},
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest))  # last: a folder without it is written anew


def _save_tensor_files(state: dict[str, torch.Tensor], folder: Path, files: int) -> dict[str, torch.Tensor]:
    """Save as safetensors files with an index; returns what was saved: f32 tensors of the same bits."""
    state = {name: tensor.view(torch.float32) for name, tensor in state.items()}
    names, each = list(state), -(-len(state) // files)
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = {name: state[name] for name in names[number * each : (number + 1) * each]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in state.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return state


def _save_in_shards(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Save as a job of several ranks does, each with rows of every tensor."""
    with tempfile.TemporaryDirectory() as meeting:
        context = multiprocessing.get_context("fork")
        torch.set_num_threads(1)  # what is forked must have no others
        arguments = [(rank, f"{meeting}/store", state, folder) for rank in range(_SAVING_RANKS)]
        ranks = [context.Process(target=_save_shard, args=each) for each in arguments]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        if any(rank.exitcode for rank in ranks):
            raise RuntimeError("a rank could not save its shard")


def _save_shard(rank: int, store: str, state: dict[str, torch.Tensor], folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    dist.init_process_group("gloo", store=dist.FileStore(store, _SAVING_RANKS), rank=rank, world_size=_SAVING_RANKS)
    mesh = init_device_mesh("cpu", (_SAVING_RANKS,))
    shards = {}
    for name, tensor in state.items():
        rows = -(-len(tensor) // _SAVING_RANKS)
        local = tensor[rank * rows : (rank + 1) * rows]
        shards[name] = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    save(shards, storage_writer=FileSystemWriter(folder, sync_files=False))
    dist.barrier()
    os._exit(0)  # not by destroy_process_group(), in which gloo may abort


def _multiply(folder: Path, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Turn a checkpoint of one tensor into one of many with the same bytes.

    Their files are hard links to one file, so that a checkpoint of 10.7 GB takes 0.5 GB of disk and page cache.
    """
    file = folder / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    [(index, stored)] = metadata.storage_data.items()
    [described] = metadata.state_dict_metadata.values()
    names = [f"tensor_{number:02}" for number in range(_COPIES)]
    for name in names:
        os.link(folder / stored.relative_path, folder / f"{name}.distcp")
    metadata.state_dict_metadata = dict.fromkeys(names, described)
    metadata.storage_data = {
        replace(index, fqn=name): replace(stored, relative_path=f"{name}.distcp") for name in names
    }
    metadata.planner_data = {name: (name,) for name in names}
    file.write_bytes(pickle.dumps(metadata))
    return dict.fromkeys(names, tensor)


def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    if name == "safetensors":
        return {f"layers.{number}.weight": (1024, 2 * 2048) for number in range(150)}
    if name == "safetensors-many":
        return {f"tensor_{number:05}": (2 * 4096,) for number in range(10_000)}
    if name == "b":
        return {f"tensor_{number:05}": (8192,) for number in range(10_000)}
    if name == "d":
        return {"tensor": (1_000_000, 1_000)}
    if name == "big":
        return {"tensor": (131_072, 2_048)}
    if name == "small":
        return {f"tensor_{number:02}": (512, 1024) for number in range(64)}
    if name in ("ranks", "ranks3"):
        return _transformer(4, _VOCABULARY // 2)
    return _transformer(12, _VOCABULARY) if name == "a" else {"tensor": (1_000,)}


def _transformer(layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    square, up, down = (_HIDDEN, _HIDDEN), (2 * _HIDDEN, _HIDDEN), (_HIDDEN, 2 * _HIDDEN)
    layer: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "k", "v", "o"), square)
    layer |= {"gate": up, "up": up, "down": down, "input_norm": (_HIDDEN,), "output_norm": (_HIDDEN,)}
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocabulary, _HIDDEN)}
    for number in range(layers):
        shapes |= {f"layers.{number}.{part}.weight": shape for part, shape in layer.items()}
    return shapes


def _random_bits(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    # Random bits, not random numbers: eight bytes at a time, which is fast, and any bit pattern is a bf16.
    words = torch.empty(math.prod(shape) // 4, dtype=torch.int64).random_(generator=generator)
    return words.view(torch.bfloat16).view(shape)
