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
# A short interval lets the event loop send replies while the model's thread decodes a batch.
SWITCH_SECONDS = 0.001


class _Server(uvicorn.Server):
    """Finish the accepted requests at SIGTERM and Ctrl-C, and return instead of raising the signal again."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.draining = True
        # A second signal ends the server without waiting for requests.
        self.force_exit = self.should_exit
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # A SIGHUP that `nohup` ignores must stay ignored.
        always = (signal.SIGINT, signal.SIGTERM)
        numbers = [n for n in SIGNALS if n in always or signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _opened(create: Callable[[], Service]) -> Iterator[Service]:
    """Create a service and close it at the end; signals are deferred meanwhile, so that its directory is removed."""
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
    """Return uvicorn's configuration for a service.

    Args:
        grace: maximum time to finish accepted requests at the end, in seconds.
    """
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


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address, GroundingError if that is not possible; port 0 takes a free port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only if the protocol is explicit. Without it a client waits 40 ms for the body.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise GroundingError(
            f"The service cannot listen at {host}:{port} ({error.strerror or error}). Choose another --port or --host.",
            code="address_unavailable",
        ) from error
    listener.listen()
    return listener


def run(create: Callable[[], Service], host: str, port: int, grace: int) -> None:
    """Create a service and serve it until SIGTERM or Ctrl-C; print the address once connections are accepted.

    Args:
        port: 0 for any free port.
        grace: maximum time to finish accepted requests after SIGTERM, in seconds.
    """
    with _opened(create) as service, listen(host, port) as listener:
        config = configuration(service, grace)
        url_host = f"[{host}]" if ":" in host else host
        print(f"http://{url_host}:{listener.getsockname()[1]}/", flush=True)
        sys.setswitchinterval(SWITCH_SECONDS)
        # The client gets the errors of its requests, so they are not logged.
        logging.getLogger("drn").setLevel(logging.ERROR)
        log.setLevel(logging.INFO)
        _Server(config, service).run([listener])
