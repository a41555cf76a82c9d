"""Weights in 8 bits: which are, how exact maps stay, and that a run with them is another one."""

from __future__ import annotations

import importlib.util
import json

import cv2
import numpy as np
import pytest
import torch

from padseg import Options, load, token_maps
from padseg.backbones import QUANTIZED
from padseg.commands import main
from padseg.errors import UsageError

needs_torchao = pytest.mark.skipif(importlib.util.find_spec('torchao') is None, reason='needs torchao')


@needs_torchao
@pytest.mark.parametrize('form', QUANTIZED)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_weights_are_rounded_row_by_row_and_nothing_else_changes(form, dtype, sd3_folder, picture):
    whole = load(str(sd3_folder), device='cpu', dtype=dtype, layer=1)
    small = load(str(sd3_folder), device='cpu', dtype=dtype, layer=1, quantize=form)
    assert small.dtype == whole.dtype and small.identity == whole.identity and small.layers == 2 and small.quantize == form
    linear = {f'{name}.weight' for name, module in small.transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    for (name, weight), exact in zip(small.transformer.named_parameters(), whole.transformer.parameters(), strict=True):
        if name not in linear:
            assert torch.equal(weight, exact), name
            continue
        assert weight.qdata.itemsize == 1 and weight.qdata.shape == exact.shape
        most = exact.float().abs().amax(1, keepdim=True)
        step = most / 127 if form == 'int8' else (exact.float().abs() / 16).clamp_min(most / 448 / 256)  # e4m3 has 3 bits after the first
        assert ((weight.dequantize().float() - exact.float()).abs() <= (0.51 if form == 'int8' else 1.05) * step + 0.01 * most).all(), name
    maps = [token_maps(picture, backbone, Options(layer=1)).maps.flatten(1).numpy() for backbone in (whole, small)]
    alike = [np.corrcoef(one, other)[0, 1] for one, other in zip(*maps, strict=True)]
    assert np.mean(alike) > (0.98 if form == 'int8' else 0.9) and not np.array_equal(*maps)


@needs_torchao
def test_projections_are_floating_point(sd3_folder):
    whole, small = (load(str(sd3_folder), device='cpu', whole=True, quantize=form) for form in (None, 'int8'))
    (weight, bias), (exact, other) = (backbone.output_projection(1) for backbone in (small, whole))
    assert type(weight) is torch.Tensor and (weight - exact).abs().max() < 0.01 * exact.abs().max() and torch.equal(bias, other)


@needs_torchao
def test_a_run_records_it(tmp_path, sd3_folder, picture, capsys):
    cv2.imwrite(str(tmp_path / 'a.png'), picture)
    usual = ['run', '--dir', str(tmp_path / 'a.png'), '--out', str(tmp_path / 'out'), '--model', str(sd3_folder), '--device', 'cpu', '-q']
    assert main([*usual, '--quantize', 'int8']) == 0
    record = json.loads((tmp_path / 'out' / 'run.json').read_text())
    assert record['settings']['quantize'] == record['requested']['quantize'] == 'int8'
    assert main([*usual, '--quantize', 'int8']) == 0 and main(usual) == 6 and main([*usual, '--quantize', 'fp8']) == 6


def test_without_torchao_one_line_says_what_to_install(monkeypatch, sd3_folder):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *rest: None if name == 'torchao' else find(name, *rest))
    with pytest.raises(UsageError, match=r"--quantize needs torchao: pip install 'padseg\[quantize\]'"):
        load(str(sd3_folder), device='cpu', quantize='int8')


def test_what_does_not_go_together_is_refused(sd3_folder):
    with pytest.raises(UsageError, match='quantize is one of int8, fp8; got int4'):
        load(str(sd3_folder), device='cpu', quantize='int4')
    with pytest.raises(UsageError, match='--quantize cannot be used with --compile'):
        load(str(sd3_folder), device='cpu', quantize='int8', compile=True)
    with pytest.raises(UsageError, match='--quantize cannot be used with --lora'):
        load(str(sd3_folder), device='cpu', quantize='int8', lora='x.safetensors')
