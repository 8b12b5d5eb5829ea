"""Configurations: of a model, and of how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class ModelConfig:
    model: str
    quantization: str | None = None


@dataclass
class LoadConfig:
    load_format: str
    model_loader_extra_config: dict[str, Any]
