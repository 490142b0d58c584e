"""Run a service on a port until SIGTERM or Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from runtime.core.errors import GroundingError
from runtime.core.interrupts import SIGNALS, deferred
from runtime.service.app import application
from runtime.service.h11_protocol import Connection
from runtime.service.middleware import HEADER_BYTES
from runtime.service.service import Service

log = logging.getLogger("drn.service")

KEEP_ALIVE_SECONDS = 15
SWEEP_SECONDS = 30
# How long a thread may hold Python before another gets its turn: replies go out while a batch is decoded.
SWITCH_SECONDS = 0.001


class _Server(uvicorn.Server):
    """Ends at SIGTERM and Ctrl-C with what it took answered, and the process goes on."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        # A second one does not wait.
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # `nohup` ignores SIGHUP, so that a service outlives its terminal.
        retained = (signal.SIGINT, signal.SIGTERM)
        numbers = [n for n in SIGNALS if n in retained or signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _opened(create: Callable[[], Service]) -> Iterator[Service]:
    """Create a service and close it at the end; signals wait meanwhile, so that its directory does not stay."""
    service = None
    try:
        with deferred():
            service = create()
        yield service
    finally:
        if service is not None:
            with deferred():
                service.close()


def configuration(service: Service, grace: int) -> uvicorn.Config:
    """Return how uvicorn is to serve a service."""
    return uvicorn.Config(
        application(service),
        http=Connection,
        ws="none",
        lifespan="off",
        callback_notify=service.sweep,
        timeout_notify=SWEEP_SECONDS,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=grace,
        h11_max_incomplete_event_size=HEADER_BYTES,
    )


def run(create: Callable[[], Service], host: str, port: int, grace: int) -> None:
    """Create a service and serve it until SIGTERM or Ctrl-C; print the address once requests are accepted.

    Raises:
        GroundingError: the port cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with _opened(create) as service, socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise GroundingError(
                f"{host}:{port} cannot be listened at ({error.strerror or error}); choose another --port or --host.",
                code="address_unavailable",
            ) from error
        config = configuration(service, grace)
        listener.listen(config.backlog)
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        print(f"http://{shown}:{listener.getsockname()[1]}/", flush=True)
        sys.setswitchinterval(SWITCH_SECONDS)
        # Errors of requests are sent to the client, and do not fill the log.
        logging.getLogger("drn").setLevel(logging.ERROR)
        log.setLevel(logging.INFO)
        _Server(config, service).run([listener])
