"""Model loaders: their base class, and the register of those that are not vLLM's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from vllm.config import LoadConfig, ModelConfig

__all__ = ["BaseModelLoader", "get_model_loader", "register_model_loader"]


class BaseModelLoader(ABC):
    def __init__(self, load_config: LoadConfig) -> None:
        self.load_config = load_config

    @abstractmethod
    def download_model(self, model_config: ModelConfig) -> None: ...

    @abstractmethod
    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None: ...


_Loader = TypeVar("_Loader", bound=type[BaseModelLoader])
_loaders: dict[str, type[BaseModelLoader]] = {}


def register_model_loader(load_format: str) -> Callable[[_Loader], _Loader]:
    def register(loader: _Loader) -> _Loader:
        _loaders[load_format] = loader
        return loader

    return register


def get_model_loader(load_config: LoadConfig) -> BaseModelLoader:
    return _loaders[load_config.load_format](load_config)
