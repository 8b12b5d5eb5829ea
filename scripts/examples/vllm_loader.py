"""A model loader for vLLM that streams safetensors files from S3, a web server or a disk: ``load_format="mpreader"``.

It is type-checked and tested against a stub of vLLM's interface only: it was never run in vLLM. Where vLLM starts
processes that don't inherit what is registered here, a package with it needs an entry point ``vllm.general_plugins``.

    python scripts/examples/vllm_loader.py FOLDER_WITH_CONFIG s3://bucket/model "a prompt"
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from vllm import LLM
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import BaseModelLoader, register_model_loader

from mpreader.safetensors import stream


@register_model_loader("mpreader")
class MpreaderModelLoader(BaseModelLoader):
    def download_model(self, model_config: ModelConfig) -> None:
        """Do nothing: the weights never are on a disk."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        uri = self.load_config.model_loader_extra_config.get("uri", model_config.model)
        loads: Any = model  # each model of vLLM has load_weights(), which torch's class does not know
        # A model that keeps a tensor may do so: it is not overwritten. In the order of the files, since models of vLLM
        # take neighbours together.
        with stream(uri, order="file") as weights:
            names: set[str] | None = loads.load_weights(weights)
        if names is not None and model_config.quantization is None:  # quantization makes parameters of its own
            missing = sorted({name for name, _ in model.named_parameters()} - names)
            if missing:
                raise ValueError(f"{uri} has no weights for {missing}")


def main(config: str, uri: str, prompt: str) -> None:
    llm = LLM(model=config, load_format="mpreader", model_loader_extra_config={"uri": uri})
    for request in llm.generate(prompt):
        print(request.outputs[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:4])
