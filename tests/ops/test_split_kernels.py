"""The Triton kernels: on a GPU where there is one, else run by Triton's interpreter where that is installed.

For the former: `pip install triton`, then `TRITON_INTERPRET=1 pytest tests/ops/test_split_kernels.py`.
"""

from __future__ import annotations

import os

import pytest
import torch

from drafttrain.ops.split_attention import split_attention
from tests.ops.split_cases import CASES, Case, definition, inputs

pytest.importorskip("triton", reason="the kernels need Triton")
ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from drafttrain.ops import split_kernels  # noqa: E402 -- needs Triton

pytestmark = pytest.mark.gpu if ON_GPU else pytest.mark.slow
DEVICE = "cuda" if ON_GPU else "cpu"
ROUNDING = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernels_equal_the_definition(case, dtype):
    arguments = inputs(case._replace(dtype=dtype), DEVICE)
    out = split_kernels.launch(*arguments)
    assert out.dtype == dtype and out.is_contiguous()
    assert (out.cpu() - definition(*arguments)).abs().max() < ROUNDING[dtype]


@pytest.mark.parametrize("processors", [1, 3, 40])
def test_any_number_of_splits_gives_the_same(processors, monkeypatch):
    monkeypatch.setattr(split_kernels, "_processors", lambda device: processors)
    arguments = inputs(Case(first=(300, 13), slots=512, window=200), DEVICE)
    assert (split_kernels.launch(*arguments).cpu() - definition(*arguments)).abs().max() < 3e-6


def test_rows_of_a_larger_storage_are_read_in_place():
    query, keys, values, *rest = inputs(Case(), DEVICE)
    larger = [torch.full((5, 2, 80, 16), torch.nan, device=DEVICE) for _ in range(2)]
    for storage, part in zip(larger, (keys, values), strict=True):
        storage[:3, :, :64] = part
    views = [storage[:3, :, :64] for storage in larger]
    assert torch.equal(split_kernels.launch(query, *views, *rest), split_kernels.launch(query, keys, values, *rest))


def test_splits_fill_the_device_but_none_is_empty_by_design():
    assert split_kernels.choose_splits(programs=8, blocks=1000, processors=132) == 33
    assert split_kernels.choose_splits(programs=8, blocks=4, processors=132) == 4
    assert split_kernels.choose_splits(programs=5000, blocks=1000, processors=132) == 1


@pytest.mark.skipif(not ON_GPU, reason="the operator takes the plain path on a CPU")
def test_the_operator_runs_the_kernels():
    arguments = inputs(Case(), DEVICE)
    assert torch.equal(split_attention(*arguments), split_kernels.launch(*arguments))
