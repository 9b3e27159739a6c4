"""Uploads arrive whole, and on a GPU wait for nothing."""

from __future__ import annotations

import pytest
import torch

from drafttrain.ops.upload import upload


@pytest.mark.parametrize("numbers", [[3, 1, 2], [[1, 2], [3, 4]], [[]]])
def test_numbers_arrive_as_they_are(numbers):
    tensor = upload(numbers, torch.device("cpu"))
    assert tensor.dtype == torch.int64
    assert tensor.tolist() == numbers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait():
    upload([0], torch.device("cuda"))  # the first one sets things up
    torch.cuda.set_sync_debug_mode("error")
    try:
        tensors = [upload([number, 7], torch.device("cuda")) for number in range(50)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [tensor.tolist() for tensor in tensors] == [[number, 7] for number in range(50)]
