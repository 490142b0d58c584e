"""Measure the service under load from other processes, relative to `ground_batch` in one process.

Service and `ground_batch` take turns of a few seconds; the ratio is the median over adjacent turns. Every reply is
compared with the moments that `ground_batch` returns for its query.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.measurement import environment
from runtime import Grounder
from runtime.benchmarking.system_info import conditions
from runtime.core.cli import command
from runtime.core.cpu_info import cores
from runtime.core.errors import CheckFailed, GroundingError
from runtime.core.io.atomic_files import check_writable, write_json
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import BATCH_SIZE

# Tolerance of seconds and scores of a moment that was computed in another batch.
TOLERANCE = 1e-3
# Connections per client process.
PER_PROCESS = 16
WARM_UP_S = 3.0
MIN_RATIO = 0.8
# Maximum relative growth of memory within a level.
MAX_GROWTH = 0.05

Question = tuple[str, str]


def serving(
    model: Path,
    data: Path,
    *,
    split: str = "test",
    concurrent: tuple[int, ...] = (1, 8, 64),
    seconds: float = 120.0,
    turn: float = 10.0,
    questions: int = 500,
    threads: int | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Load the service with clients that send the next query when they have the reply to the last.

    Args:
        model: .onnx file; the query part of a split model.
        data: data set whose sentences are the queries.
        split: split of the data set.
        concurrent: numbers of clients; each is a level.
        seconds: seconds of load per level.
        turn: seconds per turn.
        questions: maximum number of distinct queries.
        threads: number of CPU threads of the model.
        output: JSON file for the report.

    Raises:
        CheckFailed: a reply is wrong, memory grows, or the service is slower than `MIN_RATIO` of `ground_batch`.
    """
    if not (concurrent and min(concurrent) > 0 and 0 < turn <= seconds):
        raise GroundingError(
            f"Expected positive --concurrent and 0 < --turn <= --seconds, got {concurrent}, {turn} and {seconds}.",
            code="invalid_option",
        )
    check_writable(output)
    grounder = Grounder.load(model, "cpu", threads)
    asked, expected = _questions(grounder, data, split, questions)
    del grounder
    before = conditions("before")
    report: dict[str, Any] = {
        **environment(threads or 0),
        "cores": cores(),
        "python": platform.python_version(),
        "model": model.name,
        "questions": len(asked),
        "videos": len({video for video, _ in asked}),
        "levels": [],
    }
    with _service(model, data, threads) as (process, port), _reference(model, data, threads, asked) as reference:
        for count in concurrent:
            level = _level(count, seconds, turn, (process.pid, port), reference, asked, expected)
            report["levels"].append(level)
            print(_row(level), flush=True)
        process.send_signal(signal.SIGTERM)
        report["exit code"] = process.wait(60)
    report["load"] = [before.load, conditions("after").load]
    if output:
        write_json(output, report)
    wrong = [level for level in report["levels"] if level["errors"] or level["wrong"] or not level["flat"]]
    if wrong or report["exit code"]:
        raise CheckFailed(
            f"Errors, wrong replies or growing memory with {[level['concurrent'] for level in wrong]} clients. See the "
            "levels above."
        )
    slow = [level["concurrent"] for level in report["levels"] if level["of ground_batch"] < MIN_RATIO]
    if slow:
        raise CheckFailed(f"Less than {MIN_RATIO} of ground_batch with {slow} clients. Repeat on an idle machine.")
    return report


def _questions(
    grounder: Grounder, data: Path, split: str, limit: int
) -> tuple[list[Question], list[list[dict[str, float]]]]:
    """Return distinct queries in random order, and the moments of each."""
    data_set = DataSet(data)
    annotations = data_set.annotations(split, "keep", quiet=True)
    pairs = list(dict.fromkeys((annotation.video, annotation.sentence) for annotation in annotations))
    order = np.random.default_rng(0).permutation(len(pairs))[:limit]
    asked = [pairs[index] for index in order]
    videos = {name: data_set.video(name) for name in {video for video, _ in asked}}
    answers = grounder.ground_batch([(videos[video], query) for video, query in asked])
    return asked, [[vars(moment) for moment in moments] for moments in answers]


@contextmanager
def _service(model: Path, data: Path, threads: int | None) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run the service; yield its process and port."""
    words = ["--model", model, "--data", data, "--port", 0, *(["--threads", threads] if threads else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.serve", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise GroundingError("The service did not start. See its error above.")
        yield process, int(url.strip("/").rsplit(":", 1)[1])
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def _other(target: Any, *arguments: Any) -> Iterator[Connection]:
    """Run a function in another process; yield a connection to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    try:
        yield ours
    finally:
        process.terminate()
        process.join()
        ours.close()


@contextmanager
def _reference(model: Path, data: Path, threads: int | None, asked: list[Question]) -> Iterator[Connection]:
    """Run `_ground` in another process."""
    with _other(_ground, model, data, threads, asked) as connection:
        connection.recv()
        yield connection


def _ground(pipe: Connection, model: Path, data: Path, threads: int | None, asked: list[Question]) -> None:
    """Receive batch size and seconds, ground for that time, and send the pairs per second; repeat."""
    grounder, data_set = Grounder.load(model, "cpu", threads), DataSet(data)
    videos: dict[str, Any] = {}
    for name, _ in asked:
        if name not in videos:
            video = data_set.video(name)
            videos[name] = grounder.encode(video) if grounder.is_pair else video
            if not grounder.is_pair:
                grounder.segments(video)
    pairs = [(videos[video], query) for video, query in asked]
    pipe.send("ready")
    turn = 0
    while True:
        size, seconds = pipe.recv()
        done, started = 0, time.perf_counter()
        while (took := time.perf_counter() - started) < seconds:
            grounder.ground_batch([pairs[(turn + index) % len(pairs)] for index in range(size)], batch_size=size)
            turn, done = turn + size, done + size
        pipe.send(done / took)


def _clients(pipe: Connection, port: int, count: int, asked: list[Question], expected: list[Any], seed: int) -> None:
    """Receive seconds, run `count` clients for that time, and send their latencies and counts; repeat."""
    bodies = [json.dumps({"video": video, "query": query}, ensure_ascii=False).encode() for video, query in asked]
    heads = [
        b"POST /v1/ground HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (len(body), body)
        for body in bodies
    ]

    async def run() -> None:
        rng = np.random.default_rng(seed)
        streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]
        while True:
            until = time.perf_counter() + await asyncio.to_thread(pipe.recv)
            orders = [rng.permutation(len(asked)).tolist() for _ in streams]
            results = await asyncio.gather(
                *(
                    _ask(*stream, until, order, heads, asked, expected)
                    for stream, order in zip(streams, orders, strict=True)
                )
            )
            latencies = [latency for part, _ in results for latency in part]
            pipe.send((latencies, sum((counts for _, counts in results), Counter())))

    asyncio.run(run())


async def _ask(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    until: float,
    order: Sequence[int],
    heads: Sequence[bytes],
    asked: Sequence[Question],
    expected: Sequence[Any],
) -> tuple[list[float], Counter[str]]:
    """Send one query after the other until a time, and compare every reply with the expected moments."""
    latencies: list[float] = []
    counts: Counter[str] = Counter()
    turn = 0
    while (started := time.perf_counter()) < until:
        index = order[turn % len(order)]
        turn += 1
        writer.write(heads[index])
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        (length,) = (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        body = await reader.readexactly(length)
        if status == 429:
            counts["rejected"] += 1
            await asyncio.sleep(0.05)
            continue
        latencies.append(time.perf_counter() - started)
        counts["errors"] += status != 200
        if status == 200:
            counts["wrong"] += not _is_answer(json.loads(body), asked[index], expected[index])
    return latencies, counts


def _is_answer(reply: Any, question: Question, expected: Sequence[dict[str, float]]) -> bool:
    """Return whether a reply has the video, query and moments that are expected."""
    (answer,) = reply
    return (
        (answer["video"], answer["query"]) == question
        and len(answer["moments"]) == len(expected)
        and all(
            abs(moment[name] - value) <= TOLERANCE
            for moment, other in zip(answer["moments"], expected, strict=True)
            for name, value in other.items()
        )
    )


def _level(
    count: int,
    seconds: float,
    turn: float,
    service: tuple[int, int],
    reference: Connection,
    asked: list[Question],
    expected: list[Any],
) -> dict[str, Any]:
    """Load the service with `count` clients, and return the report of the level."""
    pid, port = service
    processes = -(-count // PER_PROCESS)
    shares = [count // processes + (index < count % processes) for index in range(processes)]
    size = min(count, BATCH_SIZE)
    latencies: list[float] = []
    counts: Counter[str] = Counter()
    rates, references, memory = [], [], []
    with _all(_other(_clients, port, share, asked, expected, index) for index, share in enumerate(shares)) as clients:
        _turn(clients, WARM_UP_S)
        for _ in tqdm(range(max(1, round(seconds / turn))), f"{count} clients", unit="turn", leave=False, disable=None):
            memory.append(_rss_mib(pid))
            reference.send((size, turn / 3))
            references.append(reference.recv())
            started = time.perf_counter()
            results = _turn(clients, turn)
            took = time.perf_counter() - started
            rates.append(sum(len(part) for part, _ in results) / took)
            for part, part_counts in results:
                latencies += part
                counts += part_counts
    memory.append(_rss_mib(pid))
    early, late = (statistics.median(part) for part in (memory[: len(memory) // 2 + 1], memory[len(memory) // 2 :]))
    p50, p95, p99 = np.percentile(latencies, (50, 95, 99)) * 1e3
    return {
        "concurrent": count,
        "seconds": seconds,
        "requests": len(latencies),
        "rejected": counts["rejected"],
        "errors": counts["errors"],
        "wrong": counts["wrong"],
        "requests per second": statistics.median(rates),
        "ground_batch per second": statistics.median(references),
        "ground_batch pairs at a time": size,
        "of ground_batch": statistics.median(ours / theirs for ours, theirs in zip(rates, references, strict=True)),
        "ms": {"p50": p50, "p95": p95, "p99": p99, "largest": 1e3 * max(latencies)},
        "rss MiB": memory,
        "flat": late <= (1 + MAX_GROWTH) * early,
    }


@contextmanager
def _all(contexts: Iterator[Any]) -> Iterator[list[Connection]]:
    with ExitStack() as stack:
        yield [stack.enter_context(context) for context in contexts]


def _turn(clients: Sequence[Connection], seconds: float) -> list[tuple[list[float], Counter[str]]]:
    for client in clients:
        client.send(seconds)
    return [client.recv() for client in clients]


def _rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _row(level: dict[str, Any]) -> str:
    ms = level["ms"]
    return (
        f"{level['concurrent']:>3} clients: {level['requests per second']:.1f} requests/s, "
        f"{level['of ground_batch']:.2f} of ground_batch ({level['ground_batch per second']:.1f}/s, "
        f"{level['ground_batch pairs at a time']} at a time); p50 {ms['p50']:.0f}, p95 {ms['p95']:.0f}, "
        f"p99 {ms['p99']:.0f} ms; {level['requests']} requests, {level['rejected']} rejected, "
        f"{level['errors']} errors, {level['wrong']} wrong; {level['rss MiB'][0]:.0f} -> {level['rss MiB'][-1]:.0f} MiB"
    )


if __name__ == "__main__":
    command(serving)
