"""Feed damaged and hostile files to every reader: each ends with a value or one sentence, in bounded time and memory.

    python -m tests.fuzzing                                  # all readers, 500 cases each
    python -m tests.fuzzing --reader npz --seed 17           # one case again, with its traceback

A case is a reader and a seed; the seed decides the file that is changed and how. Cases run in processes that are
forked for them, so that a crash or a hang is one finding and the others go on. `tests.fuzz_readers` has the readers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import faulthandler
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime.core.errors import MAX_MESSAGE_LENGTH, GroundingError

# Of a case, in CPU time, and on the clock for what waits: other programs may have the machine meanwhile.
CPU_S, TIMEOUT_S = 10.0, 60.0
MAX_GROWTH_BYTES = 1 << 30
# Beyond what a process has before its first case. An allocation beyond is refused, and is no growth.
ADDRESS_BYTES = 4 << 30
# Numbers that lengths, offsets and counts are likely to be compared with.
NUMBERS = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
# Values in place of a JSON value.
NUMBER_VALUES = (0, -1, 1, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**53 + 1, 2**63, 2**64, 10**299, 10**400)
TEXTS = ("", " ", "nan", "x" * 5000, "é" * 130, "../x", "a/b", "\0", "\n", "\u2028", "\ud800", "\U0001f600", "person")
CONTAINERS = ([], [[]], [0], [1, 2], ["x"], [None], [[1, 2], [3]], {}, {"x": 1}, {"format": 1}, {"": []})
VALUES: tuple[Any, ...] = (
    *(None, True, False, *NUMBER_VALUES, *TEXTS, *CONTAINERS),
    *(float("nan"), float("inf"), float("-inf")),
)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A way in for files.

    Attributes:
        name: on the command line.
        make: write a whole input into an empty directory, and return the files of it that are to be damaged.
        read: read the input in the directory, whose file was damaged, as the product does.
        seal: restore the digests of a damaged file, so that what lies behind them is reached; None if it has none.
        crashes: whether `read` runs a library in this process that the product runs in one of its own.
    """

    name: str
    make: Callable[[Path], Sequence[Path]]
    read: Callable[[Path, Path], object]
    seal: Callable[[Path], None] | None = None
    crashes: bool = False


@dataclasses.dataclass(frozen=True)
class Finding:
    """A case that ended otherwise than it may."""

    reader: str
    seed: int
    what: str


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Return a damaged copy of a file."""
    if rng.random() < 0.5:
        changed = _mutated_json(content, rng)
        if changed is not None:
            return changed
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        rng.choice(_DAMAGES)(damaged, rng)
    return bytes(damaged)


def _flip(content: bytearray, rng: random.Random) -> None:
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _set_byte(content: bytearray, rng: random.Random) -> None:
    if content:
        content[rng.randrange(len(content))] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _set_number(content: bytearray, rng: random.Random) -> None:
    size, order = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
    offset = rng.randrange(max(1, len(content) - size))
    content[offset : offset + size] = (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, order)


def _cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content) + 1) :]


def _remove(content: bytearray, rng: random.Random) -> None:
    offset = rng.randrange(len(content) + 1)
    del content[offset : offset + rng.choice((1, 4, 64, 1000))]


def _repeat(content: bytearray, rng: random.Random) -> None:
    offset, size = rng.randrange(len(content) + 1), rng.choice((1, 8, 64, 500))
    content[offset:offset] = content[offset : offset + size] * rng.choice((1, 2, 50))


def _move(content: bytearray, rng: random.Random) -> None:
    source, target, size = rng.randrange(len(content) + 1), rng.randrange(len(content) + 1), rng.choice((4, 16, 200))
    content[target : target + size] = content[source : source + size]


def _set_digits(content: bytearray, rng: random.Random) -> None:
    """Put another number in the place of decimal digits."""
    offsets = [offset for offset, byte in enumerate(content[:100_000]) if chr(byte).isdigit()]
    if offsets:
        start = end = rng.choice(offsets)
        while end < len(content) and chr(content[end]).isdigit():
            end += 1
        content[start:end] = rng.choice((b"0", b"-1", b"9" * 20, b"9" * 400, b"1e999", b"1.5", b"nan", b"1" * 5000))


def _insert_text(content: bytearray, rng: random.Random) -> None:
    offset = rng.randrange(len(content) + 1)
    texts = (b"\xff", b"\xef\xbb\xbf", b"\r", b"\n\n", b"\0", b"\xe2\x80\xa8", b"[" * 3000, b'{"a":' * 3000, b'"', b",")
    content[offset:offset] = rng.choice(texts)


_DAMAGES = (
    *(_flip, _set_byte, _set_number, _cut, _remove, _repeat, _move, _set_digits, _insert_text),
    *(_flip, _set_byte, _set_number),
)


def _mutated_json(content: bytes, rng: random.Random) -> bytes | None:
    """Return a JSON text, or one a line, with some values exchanged; None if it is none."""
    try:
        text = content.decode()
        lines = [json.loads(line) for line in text.splitlines()] if "\n{" in text else None
        value = json.loads(text) if lines is None else lines
    except ValueError:
        return None
    for _ in range(rng.choice((1, 1, 2, 5))):
        value = changed_value(value, rng)
    try:
        if lines is None or not isinstance(value, list):
            return json.dumps(value).encode()
        return "".join(json.dumps(line) + "\n" for line in value).encode()
    except (ValueError, RecursionError):
        return None


def changed_value(value: Any, rng: random.Random) -> Any:
    """Return a tree of lists and dicts in which one part is another, is gone, or is there twice."""
    if isinstance(value, list) and value and rng.random() < 0.95:
        index = rng.randrange(len(value))
        how = rng.random()
        if how < 0.08:
            return value[:index] + value[index + 1 :]
        if how < 0.14:
            return [*value, value[index]]
        return [*value[:index], changed_value(value[index], rng), *value[index + 1 :]]
    if isinstance(value, dict) and value and rng.random() < 0.95:
        name = rng.choice(list(value))
        how = rng.random()
        if how < 0.08:
            return {key: item for key, item in value.items() if key != name}
        if how < 0.14:
            return {
                (rng.choice(("", "x", "é" * 130, "\ud800", "0", name * 2)) if k == name else k): v
                for k, v in value.items()
            }
        return {**value, name: changed_value(value[name], rng)}
    if isinstance(value, (int, float)) and not isinstance(value, bool) and rng.random() < 0.3:
        return rng.choice((-value, value * 2, value + 1, value * 10**6, f"{value}"[:100], [value]))
    nested: Any = value
    if rng.random() < 0.05:
        for _ in range(rng.choice((70, 500, 900))):
            nested = [nested]
        return nested
    return rng.choice(VALUES)


def damage(reader: Reader, seed: int, directory: Path) -> Path:
    """Write the input of a case into an empty directory, and return the damaged file."""
    return _damage(reader, seed, reader.make(directory))[0]


def _damage(reader: Reader, seed: int, targets: Sequence[Path]) -> tuple[Path, bytes]:
    """Damage one of the files that a reader made, and return its path and its content before."""
    rng = random.Random(f"{reader.name} {seed}")
    target = rng.choice(list(targets))
    content = target.read_bytes()
    target.write_bytes(mutated(content, rng))
    if reader.seal is not None and rng.random() < 0.7:
        # A file that cannot be sealed is read as it is.
        with contextlib.suppress(Exception):
            reader.seal(target)
    return target, content


def run_case(reader: Reader, seed: int, directory: Path, targets: Sequence[Path]) -> str | None:
    """Damage one file of a valid input, read the input, and restore the file; return what is wrong, or None."""
    target, content = _damage(reader, seed, targets)
    try:
        reader.read(directory, target)
    except GroundingError as error:
        message = str(error)
        if "\n" in message or not message or len(message) > MAX_MESSAGE_LENGTH:
            return f"a message of {len(message)} characters and {message.count(chr(10))} line ends: {message[:200]!r}"
        if not error.code:
            return f"{type(error).__name__} without a code"
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]!r} at {Path(frame.filename).name}:{frame.lineno}"
    finally:
        target.write_bytes(content)
    return None


def _work(reader: Reader, seeds: Sequence[int], directory: Path, pipe: multiprocessing.connection.Connection) -> None:
    """Run cases in an empty directory, in this process, which was forked for them.

    Send (seed, what is wrong or None) after each.
    """
    os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESS_BYTES, size + ADDRESS_BYTES))
    # What a library prints of a crash would hide the findings.
    faulthandler.disable()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    targets = reader.make(directory)
    # A whole input is read, or else damaged ones prove nothing.
    try:
        for target in targets:
            reader.read(directory, target)
    except Exception as error:
        pipe.send((-1, f"a whole input is refused: {type(error).__name__}: {error}"))
        return
    pipe.send((-1, None))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        pipe.send((seed, "begun"))
        # Ends the process if it is reached.
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        wrong = run_case(reader, seed, directory, targets)
        signal.setitimer(signal.ITIMER_PROF, 0)
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if growth > MAX_GROWTH_BYTES:
            pipe.send((seed, f"the process grew by {growth >> 20} MiB"))
            return
        pipe.send((seed, wrong))


def fuzz(reader: Reader, seeds: Sequence[int]) -> list[Finding]:
    """Return the cases of a reader that ended otherwise than with a value or one sentence."""
    # Created and removed here, because a worker that is killed removes nothing.
    with tempfile.TemporaryDirectory(
        prefix="drn-fuzz-", dir=os.environ.get("DRN_FUZZ_DIRECTORY"), ignore_cleanup_errors=True
    ) as directory:
        return _fuzz(reader, seeds, directory)


def _fuzz(reader: Reader, seeds: Sequence[int], directory: str) -> list[Finding]:
    findings: list[Finding] = []
    left = list(seeds)
    while left:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        arguments = (reader, left, Path(tempfile.mkdtemp(dir=directory)), theirs)
        process = multiprocessing.get_context("fork").Process(target=_work, args=arguments)
        process.start()
        theirs.close()
        current: int | None = None
        done = 0
        reason = None
        try:
            while True:
                if not ours.poll(TIMEOUT_S if current is not None else 10 * TIMEOUT_S):
                    reason = f"no end after {TIMEOUT_S:g} s"
                    break
                seed, what = ours.recv()
                if what == "begun":
                    current = seed
                elif seed < 0:
                    if what is not None:
                        return [*findings, Finding(reader.name, seed, what)]
                else:
                    done += 1
                    current = None
                    if what is not None:
                        findings.append(Finding(reader.name, seed, what))
        except EOFError:
            pass
        _end(process)
        if current is not None:
            done += 1
            if reason is None:
                code = process.exitcode or 0
                reason = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
                if code == -signal.SIGPROF:
                    reason = f"no end after {CPU_S:g} s of CPU time"
                elif reader.crashes and code < 0:
                    reason = None
            if reason is not None:
                findings.append(Finding(reader.name, current, reason))
        elif not done:
            return [*findings, Finding(reader.name, -1, "the process ended before its first case")]
        left = left[done:]
    return findings


def _end(process: Any) -> None:
    process.join(1)
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()
        process.join()


def main() -> int:
    """Fuzz from the command line; return the exit code."""
    from tests.fuzz_readers import READERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", choices=[reader.name for reader in READERS], help="one reader; default: all")
    parser.add_argument("--seed", type=int, help="one case, in this process, with its traceback")
    parser.add_argument("--cases", type=int, default=500, help="of each reader")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    options = parser.parse_args()
    chosen = [reader for reader in READERS if options.reader in (None, reader.name)]
    if options.seed is not None:
        return _reproduce(chosen[0], options.seed)
    failed = cases = 0
    for reader in chosen:
        started = time.monotonic()
        findings = fuzz(reader, range(options.first, options.first + options.cases))
        cases += options.cases
        failed += len(findings)
        print(
            f"{reader.name:<24} {options.cases} cases, {len(findings)} findings, {time.monotonic() - started:.1f} s",
            flush=True,
        )
        for finding in findings[:20]:
            print(f"  --reader {finding.reader} --seed {finding.seed}: {finding.what}", flush=True)
    print(f"{cases} cases of {len(chosen)} readers, {failed} findings")
    return 1 if failed else 0


def _reproduce(reader: Reader, seed: int) -> int:
    with tempfile.TemporaryDirectory(prefix="drn-fuzz-") as name:
        directory = Path(name)
        target = damage(reader, seed, directory)
        print(f"{target.name}, {target.stat().st_size} bytes: {target.read_bytes()[:2000]!r}")
        try:
            print(f"value: {reader.read(directory, target)!r:.500}")
        except GroundingError as error:
            print(f"{type(error).__name__} ({error.code}): {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
