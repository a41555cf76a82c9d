"""Weights of a transformer's linear layers in 8 bits, by torchao through diffusers' quantization: half the memory of 16 bits."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from padseg.errors import UsageError


def quantizer_of(kind: str, model: nn.Module, place: torch.device) -> Any:
    """A quantizer of diffusers, ready for the weights of this model. kind: one of QUANTIZED. UsageError if torchao is not installed.

    Each row of a weight gets a scale of its own; computation stays in the model's dtype.
    """
    if importlib.util.find_spec('torchao') is None:
        raise UsageError("--quantize needs torchao: pip install 'padseg[quantize]'")
    from diffusers import TorchAoConfig
    from diffusers.quantizers import DiffusersAutoQuantizer
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig(version=2) if kind == 'int8' else Float8WeightOnlyConfig())
    quantizer = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
    quantizer.validate_environment()
    quantizer.preprocess_model(model=model, device_map={'': str(place)}, keep_in_fp32_modules=[])
    return quantizer


def quantized(quantizer: Any, model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A tensor of the model as it is kept: a weight of a linear layer in 8 bits, any other as it is."""
    if not quantizer.check_if_quantized_param(model, tensor, name, {}):
        return tensor
    quantizer.create_quantized_param(model, tensor, name, tensor.device, {}, [])
    return model.get_parameter(name)


def plain_weight(weight: Tensor) -> Tensor:
    """A weight that other products than a linear layer's can take."""
    return weight.dequantize() if hasattr(weight, 'qdata') else weight
