"""`python -m runtime.serve`: ground queries over HTTP, with a web page."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.backends.base import Device
from runtime.core.cli import command, suggest_next_command
from runtime.core.errors import DeviceError, GroundingError, MissingFeatures, check_option
from runtime.core.io.digests import sha256
from runtime.core.sliding_windows import resolve_windows
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import BATCH_SIZE, Grounder
from runtime.grounding.warm_up import warm_usual
from runtime.media.extraction import cache_directory
from runtime.media.extractors import open_extractor

if TYPE_CHECKING:
    from runtime.service.service import ServiceOptions

log = logging.getLogger("drn")

REQUIRED_MODULES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
MIB = 1 << 20
# At the start, videos of the data set are checked until one is valid or so many are invalid.
CHECKED_VIDEOS = 8


def serve(
    model: Path,
    *,
    data: Path | None = None,
    media: Path | None = None,
    extractor: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_host: tuple[str, ...] = (),
    api_key: str | None = None,
    batch_size: int = BATCH_SIZE,
    wait_ms: float = 2.0,
    queue_size: int = 512,
    timeout: float = 30.0,
    grace: int = 30,
    cache_mib: int = 512,
    uploads: Path | None = None,
    upload_mib: int = 512,
    uploads_mib: int = 2048,
    keep_minutes: float = 60.0,
    window: float | None = None,
    overlap: float | None = None,
    device: Device = "auto",
    threads: int | None = None,
) -> None:
    """Serve a model over HTTP until SIGTERM or Ctrl-C, then finish the accepted requests.

    Example:
        python -m runtime.serve --model drn.query.onnx --data charades --port 8000

    Args:
        model: .onnx, .engine or .pt file. For a split model give the query part, so that each video is encoded
            once.
        data: directory of a data set whose videos clients can query by name. Default: clients query uploads only.
        media: directory of the video files of --data, named after the videos, for the player of the web page.
        extractor: .onnx or .engine file that extracts the features of uploaded video files. Default: clients can
            upload features only.
        host: address to bind. Any address except this machine's loopback requires --api-key.
        port: port to bind; 0 takes a free port.
        allow_host: further host names in the addresses that clients use, for example the name of a proxy.
        api_key: key that clients must send. Prefer the environment variable DRN_API_KEY, because other users of this
            machine can read command lines.
        batch_size: maximum number of queries in one batch.
        wait_ms: maximum time in ms that the first query of a batch waits for further queries.
        queue_size: maximum number of queued queries; further requests get HTTP 429.
        timeout: maximum time of a request, in seconds.
        grace: maximum time to finish accepted requests after SIGTERM, in seconds.
        cache_mib: memory for videos that are loaded and encoded, in MiB.
        uploads: directory for uploaded files. Default: uploads in the user's cache directory (or in DRN_CACHE).
        upload_mib: maximum size of one upload, in MiB.
        uploads_mib: disk space for all uploads, in MiB; the least recently used are deleted first.
        keep_minutes: time after the last query until an upload is deleted, in minutes.
        window: window length in seconds. A longer video is grounded in overlapping windows, and their results are
            merged; 0 turns windows off. Default: set by the model.
        overlap: overlap of adjacent windows, in seconds. Default: set by the model, or half a window.
        device: device that runs the model; auto selects cuda if it is available.
        threads: number of CPU threads. Default: set by the library that runs the model.
    """
    # The fields of `ServeOptions` are the parameters of this function.
    run(ServeOptions(**locals()))
    corpus = ("--features", data or "DIR", "--queries", "queries.jsonl", "--output", "corpus")
    suggest_next_command("runtime.ground_corpus", "--model", model, *corpus)


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """The arguments of `serve`."""

    model: Path
    data: Path | None
    media: Path | None
    extractor: Path | None
    host: str
    port: int
    allow_host: tuple[str, ...]
    api_key: str | None
    batch_size: int
    wait_ms: float
    queue_size: int
    timeout: float
    grace: int
    cache_mib: int
    uploads: Path | None
    upload_mib: int
    uploads_mib: int
    keep_minutes: float
    window: float | None
    overlap: float | None
    device: Device
    threads: int | None

    @property
    def key(self) -> str | None:
        """The API key, from the argument or the environment; None without a key."""
        return self.api_key or os.environ.get("DRN_API_KEY") or None

    @property
    def is_local(self) -> bool:
        """Return whether the service is reachable from this machine only."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def validate(self) -> None:
        """Raise GroundingError if an option is out of range or requires another; no file is read."""
        if not self.is_local and self.key is None:
            raise GroundingError(
                f"--host {self.host} accepts requests from other machines, which requires --api-key (or DRN_API_KEY). "
                "Pass a key, or use 127.0.0.1.",
                code="missing_option",
            )
        check_option("--port", self.port, 0, 65535)
        check_option("--grace", self.grace, 0, 3600)
        check_option("--cache-mib", self.cache_mib, 0)
        if not (0 < self.timeout <= 3600 and 0 < self.upload_mib <= self.uploads_mib and self.keep_minutes > 0):
            raise GroundingError(
                "Expected 0 < --timeout <= 3600 seconds, 0 < --upload-mib <= --uploads-mib and --keep-minutes above 0, "
                f"got {self.timeout:g}, {self.upload_mib}, {self.uploads_mib} and {self.keep_minutes:g}. Correct the "
                "option.",
                code="invalid_option",
            )

    def service_options(self) -> ServiceOptions:
        """Return the limits of the service; GroundingError if an option is out of range."""
        from runtime.service.batching import BatchOptions
        from runtime.service.middleware import LOOPBACK, GateOptions
        from runtime.service.service import ServiceOptions
        from runtime.service.uploads import UploadOptions

        names = (*LOOPBACK, self.host, *self.allow_host) if self.is_local or self.allow_host else ()
        hosts = tuple(dict.fromkeys(name.lower() for name in names))
        return ServiceOptions(
            timeout_s=self.timeout,
            cache_bytes=self.cache_mib * MIB,
            batching=BatchOptions(self.batch_size, self.wait_ms, self.queue_size),
            gate=GateOptions(self.key, hosts, upload_bytes=self.upload_mib * MIB),
            uploads=UploadOptions(
                self.uploads or cache_directory() / "uploads",
                total_bytes=self.uploads_mib * MIB,
                keep_s=60 * self.keep_minutes,
            ),
        )


def run(options: ServeOptions) -> None:
    """Open the model, check its data, and serve until SIGTERM or Ctrl-C; see `serve`."""
    missing = [name for name in REQUIRED_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise DeviceError(
            f"{', '.join(missing)} cannot be imported. Run `pip install '.[serve]'` in the drn-deploy directory.",
            code="missing_library",
        )
    from runtime.service import server
    from runtime.service.service import Service

    options.validate()
    service_options = options.service_options()
    device, threads = options.device, options.threads
    grounder = Grounder.load(options.model, device, threads)
    grounder.windows = resolve_windows(grounder.windows, options.window, options.overlap)
    data_set = DataSet(options.data) if options.data else None
    if data_set:
        _check_features(grounder, data_set)
    digest = sha256(options.model)
    if options.extractor is not None:
        open_extractor(options.extractor, device, threads).manifest.check_fits(grounder.manifest.features)
    # Later only the batcher's thread may use the model.
    warm_usual(grounder, options.batch_size)
    create = functools.partial(
        Service,
        grounder,
        data_set,
        model=options.model.name,
        digest=digest,
        media=options.media,
        extractor=options.extractor,
        device=device,
        threads=threads,
        options=service_options,
    )
    server.run(create, options.host, options.port, options.grace)


def _check_features(grounder: Grounder, data: DataSet) -> None:
    """Raise FeatureError if the first videos of a data set do not fit the model; warn about its clip timing."""
    data.check_clock(grounder.manifest.features.clock)
    problems: list[GroundingError] = []
    for name in sorted(data.durations):
        try:
            grounder.check_fits(data.video(name))
            return
        except MissingFeatures:
            continue
        except GroundingError as error:
            # A single invalid file is reported when a client requests its video.
            problems.append(error)
            if len(problems) == CHECKED_VIDEOS:
                break
    if problems:
        raise problems[0]
    log.warning("%s has no features. Clients can query uploads only.", data.root)


if __name__ == "__main__":
    command(serve)
