"""`python -m runtime.serve`: ground sentences over HTTP, with a page to do it by hand."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from pathlib import Path

from runtime.backends.base import Device
from runtime.core.cli import command, next_command
from runtime.core.errors import DeviceError, GroundingError, MissingFeatures
from runtime.core.io.files import sha256
from runtime.core.sliding_windows import windows_asked
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import BATCH_SIZE, Grounder
from runtime.grounding.warm_up import warm_usual
from runtime.media.extraction import cache_directory
from runtime.media.extractors import open_extractor

log = logging.getLogger("drn")

NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
MIB = 1 << 20
# Videos of a data set that are opened at the start, unless one of them can be used.
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
    """Serve a model over HTTP until SIGTERM or Ctrl-C; then finish what was taken.

    Args:
        model: .onnx, .engine or .pt file; of a split model the query part, so that videos are encoded once.
        data: directory of a data set, whose videos can be asked by name.
        media: directory of the same videos as files, named after them, for the page's player.
        extractor: .onnx or .engine file that makes features of a video file, so that videos can be sent.
        host: address to listen at; any other than this machine's own needs --api-key.
        port: 0 takes a free one.
        allow_host: names that clients call the service by, where it is not this machine's own.
        api_key: what clients must show, also as DRN_API_KEY in the environment, which other users cannot read.
        batch_size: most sentences asked at once.
        wait_ms: how long the first of a batch waits for others, where others are expected.
        queue_size: most sentences that wait; what would be more is answered 429.
        timeout: seconds until a request is given up.
        grace: seconds to finish in after SIGTERM.
        cache_mib: memory for videos that are ready to be asked.
        uploads: directory for what clients send, in the user's cache directory (or DRN_CACHE) when not given.
        upload_mib: largest body of an upload.
        uploads_mib: disk for all uploads; the oldest go first.
        keep_minutes: how long an upload stays after it was last asked.
        window: seconds; a longer video is grounded in windows of this length, whose answers are merged. 0 grounds any
            video whole; the model's own when not given.
        overlap: seconds that neighbouring windows share; the model's own, or half a window, when not given.
        device: auto, cpu or cuda.
        threads: CPU threads of the model.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DeviceError(f"{', '.join(missing)} cannot be imported; run `pip install 'drn-deploy[serve]'`.")
    from runtime.service.batching import BatchOptions
    from runtime.service.middleware import LOOPBACK, GateOptions
    from runtime.service.server import run
    from runtime.service.service import Service, ServiceOptions
    from runtime.service.uploads import UploadOptions

    api_key = api_key or os.environ.get("DRN_API_KEY") or None
    here = host in ("localhost", "::1") or host.startswith("127.")
    if not here and api_key is None:
        raise GroundingError(
            f"At {host} others than this machine can ask; pass --api-key (or DRN_API_KEY), or keep to 127.0.0.1."
        )
    if not 0 <= port <= 65535:
        raise GroundingError(f"--port must be 0 to 65535, and {port} was given.")
    if not (0 < timeout <= 3600 and 0 <= grace <= 3600):
        raise GroundingError(
            f"--timeout is above 0, --grace 0 or more, and both at most 3600 s; {timeout:g} and {grace} were given."
        )
    if not (cache_mib >= 0 and 0 < upload_mib <= uploads_mib and keep_minutes > 0):
        raise GroundingError(
            f"--cache-mib is 0 or more, --upload-mib above 0 and at most --uploads-mib, and --keep-minutes above 0; "
            f"{cache_mib}, {upload_mib}, {uploads_mib} and {keep_minutes:g} were given."
        )
    hosts = tuple(dict.fromkeys(name.lower() for name in (*LOOPBACK, host, *allow_host))) if here or allow_host else ()
    options = ServiceOptions(
        timeout_s=timeout,
        cache_bytes=cache_mib * MIB,
        batching=BatchOptions(batch_size, wait_ms, queue_size),
        gate=GateOptions(api_key, hosts, upload_bytes=upload_mib * MIB),
        uploads=UploadOptions(
            uploads or cache_directory() / "uploads", total_bytes=uploads_mib * MIB, keep_s=60 * keep_minutes
        ),
    )
    grounder = Grounder.load(model, device, threads)
    grounder.windows = windows_asked(grounder.windows, window, overlap)
    data_set = DataSet(data) if data else None
    if data_set:
        _check_features(grounder, data_set)
    digest = sha256(model)
    if extractor is not None:
        # Opened once, to see that it is one whose features the model takes.
        open_extractor(extractor, device, threads).manifest.check_fits(grounder.manifest.features)
    # Before requests are taken: the service's own thread owns the model from then on.
    warm_usual(grounder, batch_size)
    create = functools.partial(
        Service,
        grounder,
        data_set,
        model=model.name,
        digest=digest,
        media=media,
        extractor=extractor,
        device=device,
        threads=threads,
        options=options,
    )
    run(create, host, port, grace)
    next_command("runtime.benchmark", "--model", model, "--data", data or "DIR")


def _check_features(grounder: Grounder, data: DataSet) -> None:
    """Raise FeatureError if the model cannot take the features of the first few usable videos of a data set.

    A clock that is not the model's is warned of.
    """
    data.check_clock(grounder.manifest.features.clock)
    problems: list[GroundingError] = []
    for name in sorted(data.durations):
        try:
            grounder.check_fits(data.video(name))
            return
        except MissingFeatures:
            continue
        except GroundingError as error:
            # One odd file among good ones is an error of its own when it is asked.
            problems.append(error)
            if len(problems) == CHECKED_VIDEOS:
                break
    if problems:
        raise problems[0]
    log.warning("%s holds usable features of none of its videos; only what is sent can be asked.", data.root)


if __name__ == "__main__":
    command(serve)
