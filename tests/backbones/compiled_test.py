"""Compiled blocks give the same maps, for pictures of all shapes; where torch cannot compile, the message says what is missing."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from padseg.backbones import load
from padseg.backbones.cpu_attention import attention_by_rows, by_rows
from padseg.backbones.parts import has_bfloat16
from padseg.errors import UsageError
from padseg.methods.seg4diff import Options, segment, token_maps

can_compile = shutil.which('g++') is not None and (Path(sysconfig.get_path('include')) / 'Python.h').exists()
native = pytest.mark.skipif(not has_bfloat16(torch.device('cpu')), reason='this CPU emulates bfloat16, which takes many times as long')
compiles = pytest.mark.skipif(not can_compile, reason='no C++ compiler, or no headers of Python')


@pytest.mark.slow
@compiles
@pytest.mark.parametrize(('dtype', 'bound'), [('float32', 1e-5), pytest.param('bfloat16', 0.05, marks=native)])
def test_compiled_blocks_give_the_same_maps(dtype, bound, sd3_folder, picture):
    """Wide and tall: one compilation for both, and the block that is read stays as it was."""
    plain, compiled = (load(str(sd3_folder), device='cpu', dtype=dtype, layer=1, compile=each) for each in (False, True))
    assert compiled.compiled == plain.layers - 1 == 1 and plain.compiled == 0
    torch._dynamo.utils.counters.clear()
    graphs = []
    for image in (picture, picture.transpose(1, 0, 2)[:, :20]):
        expected, found = (token_maps(image, each, Options(layer=1)).maps for each in (plain, compiled))
        assert (found - expected).abs().max() <= bound * expected.abs().max()
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
    assert graphs[0] == graphs[1] > 0 and not torch._dynamo.utils.counters['graph_break']
    assert segment(picture, compiled, Options(layer=1)).labels.shape == picture.shape[:2]


@compiles
def test_a_compiled_block_is_not_read(sd3_folder, picture):
    backbone = load(str(sd3_folder), device='cpu', compile=True)
    with pytest.raises(UsageError, match=r'load\(layer=0, compile=True\)'):
        token_maps(picture, backbone, Options(layer=0))
    assert load(str(sd3_folder), device='cpu', layer=0, compile=True).compiled == 0


def test_without_a_compiler_the_message_says_so(sd3_folder, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler -O2')
    with pytest.raises(UsageError, match='needs a C.. compiler, and there is no no-such-compiler: install it, or omit --compile'):
        load(str(sd3_folder), device='cpu', compile=True)


def test_without_pythons_headers_the_message_says_so(sd3_folder, monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', 'true')  # a program that is there
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path / name))
    with pytest.raises(UsageError, match='needs the Python headers in .*include: '):
        load(str(sd3_folder), device='cpu', compile=True)


@compiles
def test_attention_by_rows_is_one_step_of_a_compiled_function():
    query, key, value = (torch.randn(1, 2, 300, 8, dtype=torch.bfloat16) for _ in range(3))
    graphs = []

    def keep(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == 'call_function'])
        return graph

    compiled = torch.compile(torch.nn.functional.scaled_dot_product_attention, backend=keep)
    with by_rows():
        found = compiled(query, key, value)
    assert torch.equal(found, attention_by_rows(query, key, value))
    assert [str(target) for target in graphs[0]] == ['padseg.attention_by_rows.default']
