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
    """Return an `ILogger` that stores errors in `lines` and the last warning in `last_warning`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []
            self.last_warning = ""

        def log(self, severity: Any, message: str) -> None:
            # TensorRT breaks lines within a message.
            line = " ".join(message.split())
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.lines.append(line)
            elif severity == trt.ILogger.WARNING:
                self.last_warning = line
                log.debug("TensorRT: %s", line)

    return Logger()


class CallChecker:
    """Raise the errors that TensorRT logged if a call on an engine failed."""

    def __init__(self, trt: Any, logger: Any, name: str) -> None:
        self._library = f"{trt.__name__} {trt.__version__}"
        self._logger, self._name = logger, name

    def require(self, ok: Any, action: str, advice: str = ". Build the engine again") -> None:
        """Raise CudaError, or OutOfDeviceMemory, unless a call succeeded.

        Args:
            action: verb and object of the call: "load the plan".
            advice: end of the message of a CudaError, which states what to do, without a full stop. If memory ran out,
                the caller adds advice.
        """
        if ok:
            self._logger.lines.clear()
            return
        message = "; ".join(self._logger.lines)[:500] or "no reason was logged"
        self._logger.lines.clear()
        sentence = f"{self._library} could not {action} of {self._name}: {message}"
        if is_out_of_memory(message):
            raise OutOfDeviceMemory(f"{sentence.rstrip('.')}.")
        raise CudaError(f"{sentence.rstrip('.')}{advice}.")

    def discard(self) -> None:
        """Discard the errors that were logged."""
        self._logger.lines.clear()


@contextlib.contextmanager
def explain_startup_failure(trt: Any, logger: Any, driver: str | None) -> Iterator[None]:
    """Raise an error with the logged reason if TensorRT cannot be initialized; its constructors raise TypeError only.

    Args:
        driver: newest CUDA version that the driver supports; None if unknown.

    Raises:
        DeviceError: with the errors that were logged, or else the last warning, which contains CUDA's error code.
    """
    try:
        yield
    except TypeError as error:
        message = "; ".join(logger.lines) or logger.last_warning or str(error)
        raise DeviceError(
            f"{trt.__name__} {trt.__version__} could not start with a driver for CUDA {driver or '(unknown version)'}: "
            f"{message.rstrip('.')}. Install a newer driver, or a build of the library for that CUDA version.",
            code="driver_too_old",
        ) from error
