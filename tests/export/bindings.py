"""Read the API of TensorRT's Python bindings on a machine without TensorRT or a GPU.

The wheels of the bindings (6 MB) contain the full Python API, but not the libraries. They import nine functions of
these libraries, so three stub libraries of a few lines of C are enough to import the bindings and to check calls. The
stubs build and run nothing.

TensorRT 8.6 has wheels for Python 3.8 to 3.10 only, so its API was recorded once: the classes of `WATCHED`, and
all names that are not classes.

    python3.9 -m pip install --no-deps --target FOLDER tensorrt-bindings==8.6.1
    python3.9 tests/export/bindings.py FOLDER > tests/export/recorded/tensorrt-8.6.json

Therefore this module uses only the standard library, and no syntax newer than Python 3.10.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# One object stands behind all methods and returns itself from every call. As a pointer it is an object of any class, as
# a boolean true (its address ends in 01), as a size 65,537 (its address is low and readable), and as text empty. So the
# bindings run complete programs and convert every argument.
_STUBS = """
#define _GNU_SOURCE
#include <sys/mman.h>
#define LOW 0x10000
static const struct { void *methods; const char *name; } type = {0, "8Anything"};
static void *anything(void) { return (void *)(LOW + 1); }
static int int8(void) { return 2; }
__attribute__((constructor)) static void make(void)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    if (mmap((void *)LOW, 0x20000, PROT_READ | PROT_WRITE, flags, -1, 0) != (void *)LOW) return;
    void **methods = (void **)(LOW + 0x1000);
    methods[-1] = (void *)&type;
    for (int index = 0; index < 1024; index++) methods[index] = anything;
    /* Of host memory, after two destructors, its data and its size: the type of its elements. */
    methods[4] = int8;
    /* An object's first word is where its methods are; the second, in most classes, what implements them. */
    ((void **)(LOW + 1))[0] = methods;
    ((void **)(LOW + 1))[1] = anything();
}
void *createInferBuilder_INTERNAL(void) { return anything(); }
void *createInferRefitter_INTERNAL(void) { return anything(); }
void *createInferRuntime_INTERNAL(void) { return anything(); }
void *createNvOnnxParser_INTERNAL(void) { return anything(); }
void *createNvOnnxParserRefitter_INTERNAL(void) { return anything(); }
void *getBuilderPluginRegistry(void) { return anything(); }
void *getPluginRegistry(void) { return anything(); }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 1; }
"""
# 8.6 also has the Caffe and UFF parsers, which are C++.
_STUBS_86 = """
void *_ZN11nvuffparser15createUffParserEv(void) { return 0; }
void _ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi(void) {}
void *_ZN14nvcaffeparser117createCaffeParserEv(void) { return 0; }
void _ZN14nvcaffeparser123shutdownProtobufLibraryEv(void) {}
"""

# The classes that the source uses or could use.
WATCHED = (
    "Builder", "BuilderFlag", "DataType", "Dims", "EngineInspector", "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory", "ILayer",
    "ILogger", "INetworkDefinition", "IOptimizationProfile", "ITimingCache", "LayerInformationFormat", "Logger",
    "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "PreviewFeature",
    "ProfilingVerbosity", "Runtime", "TacticSource", "TensorFormat", "TensorIOMode", "TensorLocation",
)  # fmt: skip

Surface = dict[str, Any]


class ProcessFailed(Exception):
    """A process failed; the message contains its last line."""


def compiler() -> str | None:
    """Return the path of the C compiler; None without one."""
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


def build_stubs(bindings: Path, folder: Path) -> None:
    """Compile stubs of the libraries that the extension module in `bindings` needs, with the names it needs."""
    extension = (bindings / "tensorrt_bindings" / "tensorrt.so").read_bytes()
    names = {
        name.decode()
        for name in re.findall(rb"lib(?:nvinfer|nvinfer_plugin|nvonnxparser|nvparsers)\.so\.\d+", extension)
    }
    source = folder / "stubs.c"
    source.write_text(_STUBS + _STUBS_86)
    for name in sorted(names):
        command = [str(compiler()), "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
        subprocess.run(command, check=True, capture_output=True)


def run_with(bindings: Path | None, code: str) -> str:
    """Run code in a new process, because a process can import only one version of a module, and return its output.

    Args:
        bindings: folder of the bindings, to which stubs are added; None for an installed library.
        code: Python code.

    Raises:
        ProcessFailed: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ, PYTHONPATH=str(ROOT))
        if bindings is not None:
            build_stubs(bindings, Path(folder))
            environment["PYTHONPATH"] = os.pathsep.join((str(bindings), str(ROOT)))
            environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("LD_LIBRARY_PATH"))))
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise ProcessFailed((run.stderr.strip() or f"exit status {run.returncode}").splitlines()[-1])
    return run.stdout


@functools.cache
def read_surface(bindings: Path | None, module: str) -> Surface:
    """Return the API of a module, see `surface_of`, read in a new process."""
    directory = json.dumps(str(Path(__file__).parent))
    code = f"import sys; sys.path.append({directory}); import bindings, json, {module} as library"
    return dict(json.loads(run_with(bindings, code + "; print(json.dumps(bindings.surface_of(library)))")))


def surface_of(module: Any) -> Surface:
    """Return a module's version and names: `{"version": ..., "names": {name: {...}}}`.

    A class is `{"members": {name: {...}}, "bases": [name, ...]}`. A member is a `value` of an enum, a method with
    `signatures`, a property with its `type` and whether it is `writable`, or anything else with its `type`.
    """
    names = {}
    for name in dir(module):
        thing = getattr(module, name)
        if inspect.isclass(thing):
            members = {member: _member(thing, member) for member in dir(thing) if _is_public(member)}
            names[name] = {"members": members, "bases": [base.__name__ for base in thing.__mro__]}
        elif _is_public(name):
            names[name] = (
                {"signatures": _signatures(thing.__doc__)} if callable(thing) else {"type": type(thing).__name__}
            )
    return {"version": module.__version__, "names": names}


def _is_public(name: str) -> bool:
    return name == "__init__" or not name.startswith("_")


def _member(owner: Any, name: str) -> dict[str, Any]:
    values = getattr(owner, "__members__", {})
    if name in values:
        return {"value": int(values[name])}
    member = inspect.getattr_static(owner, name)
    if isinstance(member, property):
        signatures = _signatures(member.fget.__doc__ if member.fget else None) or [[[], None]]
        return {"type": signatures[0][1], "writable": member.fset is not None}
    member = getattr(owner, name)
    if callable(member):
        return {"signatures": _signatures(member.__doc__)}
    return {"type": type(member).__name__}


def _signatures(doc: str | None) -> list[tuple[list[list[Any]], str | None]]:
    """Return the overloads in a docstring of pybind11, as `([[parameter, type, required], ...], returned)`."""
    overloads = []
    for line in (doc or "").splitlines():
        match = re.match(r"^(?:\d+\. )?\w*\((.*)\) -> (.+)$", line)
        if match and match.group(1) != "*args, **kwargs":
            parameters = [_parameter(text) for text in _split(match.group(1)) if text not in ("*", "/")]
            overloads.append(([known for known in parameters if known[0] != "self"], _short(match.group(2))))
    return overloads


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _parameter(text: str) -> list[Any]:
    declared, _, default = text.partition(" = ")
    name, _, kind = declared.partition(":")
    return [name.strip(), _short(kind.strip()), not default]


def _short(kind: str) -> str:
    """Return the name of a class without its module, which differs between versions."""
    return re.sub(r"\b\w+(?:\.\w+)*\.(\w+)", r"\1", kind)


if __name__ == "__main__":
    read = read_surface(Path(sys.argv[1]), "tensorrt_bindings")
    kept = ",\n".join(
        f'"{name}": {json.dumps(told)}'
        for name, told in read["names"].items()
        if name in WATCHED or "members" not in told
    )
    print(f'{{"version": "{read["version"]}", "names": {{\n{kept}\n}}}}')
