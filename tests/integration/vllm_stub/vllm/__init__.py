"""Stub of vLLM: as much of its interface as a model loader meets. The names and types are vLLM's, nothing else is.

A model is made from no configuration: it is one linear layer, whose weights the loader brings.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch

from vllm.config import LoadConfig, ModelConfig
from vllm.model_executor.model_loader import get_model_loader

__all__ = ["LLM"]


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        parameters, loaded = dict(self.named_parameters()), set()
        for name, weight in weights:
            if name in parameters:
                parameters[name].data.copy_(weight)
                loaded.add(name)
        return loaded


class LLM:
    def __init__(self, *, model: str, load_format: str, model_loader_extra_config: dict[str, Any]) -> None:
        config = ModelConfig(model)
        loader = get_model_loader(LoadConfig(load_format, model_loader_extra_config))
        loader.download_model(config)
        self._model = _Model()
        loader.load_weights(self._model, config)

    def generate(self, prompts: str) -> list[Any]:
        told = {name: tensor.tolist() for name, tensor in self._model.state_dict().items()}
        return [SimpleNamespace(outputs=[SimpleNamespace(text=f"{prompts}: {told}")])]
