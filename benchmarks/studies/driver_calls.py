"""Compare the time of CUDA driver calls through ctypes with that through NVIDIA's cuda-bindings, without a GPU.

A library of functions that only return CUDA_SUCCESS takes the place of the driver, so what is measured is the time in
Python. It needs cuda-bindings, a C compiler, and Linux.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measurement import environment
from runtime.backends.cuda_driver import LIBRARY, SIGNATURES
from runtime.core.cli import command
from runtime.core.errors import DeviceError

REPEATS = 2000
# cuda-bindings resolves every function with cuGetProcAddress: cudaVersion, flags and the status are its last arguments.
RESOLVER = """
#include <string.h>
static int success(void) { return 0; }
int cuDriverGetVersion(int *version) { *version = 12090; return 0; }
int cuGetProcAddress_v2(const char *symbol, void **function, int version, unsigned long long flags, int *status) {
    *function = strcmp(symbol, "cuDriverGetVersion") ? (void *)success : (void *)cuDriverGetVersion;
    if (status) *status = 0;
    return 0;
}
int cuGetProcAddress(const char *symbol, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, 0);
}
"""
CONTEXT, STREAM, GRAPH, HOST, DEVICE, SIZE = 1, 2, 3, 4096, 8192, 100


def driver_calls(*, rounds: int = 40) -> dict[str, Any]:
    """Time the six driver calls of one query with a captured CUDA graph.

    Args:
        rounds: rounds of 2,000 queries; in each round both take their turn.

    Returns:
        Median microseconds of the six calls together, and their ratio.
    """
    if os.environ.get("DRN_DRIVER_DOUBLE") != "1":
        return _run_with_double(rounds)
    try:
        queries = {"ctypes": _with_ctypes(), "cuda-bindings": _with_cuda_bindings()}
    except ImportError as error:
        raise DeviceError(f"cuda-bindings cannot be imported ({error}). Install it with pip.") from error
    times: dict[str, list[float]] = {name: [] for name in queries}
    for _ in range(rounds):
        for name, query in queries.items():
            start = time.perf_counter()
            for _ in range(REPEATS):
                query()
            times[name].append((time.perf_counter() - start) / REPEATS * 1e6)
    ratios = [a / b for a, b in zip(times["ctypes"], times["cuda-bindings"], strict=True)]
    report = {
        "us": {name: round(median(values), 2) for name, values in times.items()},
        "ratio": round(median(ratios), 2),
    }
    print(
        f"six driver calls: ctypes {report['us']['ctypes']} us, cuda-bindings {report['us']['cuda-bindings']} us; "
        f"ratio {report['ratio']}"
    )
    return {**report, **environment(1, ("cuda-bindings", "numpy"))}


def _run_with_double(rounds: int) -> dict[str, Any]:
    """Compile the driver double and run this module again with it in the library path."""
    functions = [name for name in SIGNATURES if name != "cuDriverGetVersion"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "driver.c")
        source.write_text(RESOLVER + "".join(f"int {name}(void) {{ return 0; }}\n" for name in functions))
        library = Path(folder, LIBRARY)
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        variables = {**os.environ, "DRN_DRIVER_DOUBLE": "1", "LD_LIBRARY_PATH": folder}
        arguments = [sys.executable, "-m", "benchmarks.studies.driver_calls", "--rounds", str(rounds)]
        subprocess.run(arguments, env=variables, check=True)
    return {}


def _with_ctypes() -> Callable[[], None]:
    library = ctypes.CDLL(LIBRARY)
    calls: dict[str, Any] = {}
    for name, types in SIGNATURES.items():
        calls[name] = getattr(library, name)
        calls[name].argtypes, calls[name].restype = types, ctypes.c_int

    def check(name: str, *arguments: Any) -> None:
        if calls[name](*arguments):
            raise RuntimeError(name)

    def query() -> None:
        check("cuCtxPushCurrent_v2", CONTEXT)
        check("cuMemcpyHtoDAsync_v2", DEVICE, HOST, SIZE, STREAM)
        check("cuGraphLaunch", GRAPH, STREAM)
        check("cuMemcpyDtoHAsync_v2", HOST, DEVICE, SIZE, STREAM)
        check("cuStreamSynchronize", STREAM)
        check("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    return query


def _with_cuda_bindings() -> Callable[[], None]:
    from cuda.bindings import driver

    context, graph, stream = driver.CUcontext(CONTEXT), driver.CUgraphExec(GRAPH), driver.CUstream(STREAM)

    def check(result: tuple[Any, ...]) -> None:
        if result[0]:
            raise RuntimeError(result[0])

    def query() -> None:
        check(driver.cuCtxPushCurrent(context))
        check(driver.cuMemcpyHtoDAsync(DEVICE, HOST, SIZE, stream))
        check(driver.cuGraphLaunch(graph, stream))
        check(driver.cuMemcpyDtoHAsync(HOST, DEVICE, SIZE, stream))
        check(driver.cuStreamSynchronize(stream))
        check(driver.cuCtxPopCurrent())

    return query


if __name__ == "__main__":
    command(driver_calls)
