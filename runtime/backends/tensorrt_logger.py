"""Collect the errors that TensorRT logs, and raise them where a call failed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from runtime.backends.cuda_driver import CudaError, OutOfDeviceMemory
from runtime.core.errors import DeviceError, is_out_of_memory

log = logging.getLogger("drn")


def logger_for(trt: Any) -> Any:
    """Return a logger of TensorRT that stores errors, in `lines`, and the last warning, in `warned`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.warned = ""

        def log(self, severity: Any, message: str) -> None:
            # TensorRT breaks lines within a message, also before its last bracket.
            line = " ".join(message.split())
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(line)
            elif severity == trt.ILogger.WARNING:
                self.warned = line
                log.debug("TensorRT: %s", self.warned)

    return Logger()


class CallChecker:
    """Raise the errors that TensorRT logged if a call on an engine failed.

    Args:
        trt: the library.
        logger: of `logger_for`, which the engine logs to.
        name: of the engine file.
    """

    def __init__(self, trt: Any, logger: Any, name: str) -> None:
        self._library = f"{trt.__name__} {trt.__version__}"
        self._logger, self._name = logger, name

    def require(self, ok: Any, action: str, advice: str = "") -> None:
        """Raise CudaError, or OutOfDeviceMemory, unless a call succeeded.

        Args:
            ok: what the call returned; false if it failed.
            action: what was to be done, as a verb with its object.
            advice: what to do about it, as the end of a sentence.
        """
        if ok:
            self._logger.lines.clear()
            return
        message = "; ".join(self._logger.lines)[:500] or "it did not say why"
        self._logger.lines.clear()
        sentence = f"{self._library} could not {action} of {self._name}: {message}"
        kind = OutOfDeviceMemory if is_out_of_memory(message) else CudaError
        raise kind(f"{sentence.rstrip('.')}{advice}.")

    def discard(self) -> None:
        """Discard the errors that were logged."""
        self._logger.lines.clear()


@contextlib.contextmanager
def explain_startup_failure(trt: Any, logger: Any, driver: str | None) -> Iterator[None]:
    """Raise an error with the reason if TensorRT's own objects cannot be created; its constructors report none.

    Args:
        trt: the library.
        logger: of `logger_for`, which it was given.
        driver: the newest CUDA version that the driver runs.

    Raises:
        DeviceError: with the last messages of the library, which are a warning of CUDA's error code.
    """
    try:
        yield
    except TypeError as error:
        message = "; ".join(logger.lines) or logger.warned or str(error)
        raise DeviceError(
            f"{trt.__name__} {trt.__version__} could not start on this machine, whose driver runs CUDA "
            f"{driver or 'of an unknown version'} and older: {message.rstrip('.')}; install a newer driver, or a build "
            "of the library for that CUDA.",
            code="driver_too_old",
        ) from error
