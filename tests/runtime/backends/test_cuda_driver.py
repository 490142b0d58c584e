"""Test `runtime.backends.cuda_driver` and `encoding_cache`: errors of the driver, and slots on the GPU."""

from __future__ import annotations

import ctypes.util

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.fake_tensorrt import Driver
from runtime.backends.cuda_driver import SIGNATURES, Cuda, CudaError, OutOfDeviceMemory
from runtime.backends.encoding_cache import EncodingSlots
from runtime.core.errors import DeviceError
from tests.raising import raises


def test_failed_cuda_call_is_named_with_driver_message() -> None:
    driver = Driver()
    cuda = Cuda(driver)
    assert (cuda.name, cuda.capability, cuda.driver) == ("NVIDIA H100", "9.0", "13.0")
    with raises(CudaError, "gpu_call_failed", "cuMemFree_v2", "CUDA_ERROR_INVALID_CONTEXT", 201):
        cuda.free(3)
    with cuda.current():
        with raises(CudaError, "gpu_call_failed", "cuMemFree_v2", "CUDA_ERROR_INVALID_VALUE", 1):
            cuda.free(3)
        driver.room = 100
        with raises(OutOfDeviceMemory, "out_of_memory", "CUDA_ERROR_OUT_OF_MEMORY"):
            cuda.allocate(200)


def test_driver_without_gpus_or_too_old_raises_error() -> None:
    with raises(DeviceError, "gpu_unavailable", "CUDA_VISIBLE_DEVICES"):
        Cuda(Driver(devices=0))
    driver = Driver()
    names = {name: getattr(driver, name) for name in SIGNATURES if name != "cuGraphInstantiateWithFlags"}
    with raises(DeviceError, "driver_too_old", "cuGraphInstantiateWithFlags"):
        Cuda(type("Old", (), {name: staticmethod(call) for name, call in names.items()}))


def test_missing_cuda_driver_raises_gpu_unavailable() -> None:
    if ctypes.util.find_library("cuda"):
        pytest.skip("this machine has a CUDA driver")
    with raises(DeviceError, "gpu_unavailable", "libcuda.so.1"):
        Cuda()


@given(st.integers(1, 5), st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=5, unique=True)))
def test_encoding_slots_hold_the_last_used_keys(slots: int, requests: list[list[str]]) -> None:
    cache, content = EncodingSlots(slots), {}
    recent: list[str] = []
    for keys in (request[:slots] for request in requests):
        acquired, missing = cache.acquire(keys)
        assert len(set(acquired.tolist())) == len(keys)
        for position in missing:
            content[int(acquired[position])] = keys[position]
        assert [content[slot] for slot in acquired.tolist()] == keys
        recent = [key for key in recent if key not in keys] + keys
        assert set(recent[-slots:]) == set(content.values())
