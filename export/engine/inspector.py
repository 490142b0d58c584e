"""Read the engine inspector of TensorRT for a new plan, without a context and with each optimization profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from export.engine.profiles import Profile
from runtime.artifacts.engine_layers import Inspection, ProfileView
from runtime.backends.cuda_driver import Cuda
from runtime.core.errors import GroundingError, ModelFileError, one_line


class PlanNotLoaded(ModelFileError):
    """The library cannot load the plan that it built."""

    code = "plan_not_loaded"


def inspect_plan(
    trt: Any,
    logger: Any,
    plan: bytes,
    profiles: Sequence[Profile],
    *,
    host_code: bool = False,
    cuda: Cuda | None = None,
) -> Inspection:
    """Return the output of the inspector for a plan.

    Args:
        trt: the library that built the plan.
        logger: logger that `logger_for` returned.
        plan: serialized engine. It is deserialized, so it must come from this process.
        profiles: optimization profiles, in the order of the build.
        host_code: whether the plan is version-compatible. Such a plan contains the lean runtime, which is code, and
            loads only if `IRuntime::setEngineHostCodeAllowed` permits it (NvInferRuntime.h; Polygraphy's loader.py).
        cuda: the GPU; None opens the first one.

    Raises:
        PlanNotLoaded: the library cannot deserialize the plan.
    """
    runtime = trt.Runtime(logger)
    if host_code:
        runtime.engine_host_code_allowed = True
    logger.lines.clear()
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise PlanNotLoaded(
            f"{trt.__name__} {trt.__version__} cannot load the plan that it built "
            f"({'; '.join(logger.lines)[:500] or 'no reason given'}). Try --profiles 1 or another precision."
        )
    inspector = engine.create_engine_inspector()
    unbound = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    try:
        cuda = cuda or Cuda()
    except GroundingError as error:
        reason = one_line(error)
        return Inspection(unbound, tuple(ProfileView(profile.name, {}, None, reason) for profile in profiles))
    views = []
    for index, profile in enumerate(profiles):
        shapes = {name: opt for name, (_, opt, _) in profile.shapes.items()}
        try:
            text = _inspect_profile(trt, logger, engine, inspector, cuda, index, shapes)
        # A failure here is no evidence about the precision of the plan.
        except (GroundingError, RuntimeError, TypeError, ValueError) as error:
            views.append(ProfileView(profile.name, shapes, None, one_line(error)))
        else:
            views.append(ProfileView(profile.name, shapes, text))
    return Inspection(unbound, tuple(views))


def _inspect_profile(
    trt: Any, logger: Any, engine: Any, inspector: Any, cuda: Cuda, index: int, shapes: Mapping[str, Sequence[int]]
) -> str:
    """Return the inspector's JSON for an execution context with a profile and the shapes of all inputs.

    Without one it shows no concrete sizes and formats (`IEngineInspector::setExecutionContext` in NvInferRuntime.h).
    """
    with cuda.current():
        stream = cuda.stream()
        try:
            context = engine.create_execution_context()
            _expect(context is not None, logger, "an execution context could not be created")
            selected = context.set_optimization_profile_async(index, stream)
            _expect(selected, logger, f"profile {index} could not be selected")
            # Shapes may only be set after the stream has switched the profile.
            cuda.synchronize(stream)
            for name, shape in shapes.items():
                fits = context.set_input_shape(name, tuple(shape))
                _expect(fits, logger, f"the shape {tuple(shape)} of {name} could not be set")
            inspector.execution_context = context
            text = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
            # The inspector must not outlive its context.
            inspector.execution_context = None
            return text
        finally:
            cuda.destroy_stream(stream)


def _expect(ok: Any, logger: Any, failure: str) -> None:
    if ok:
        return
    details = "; ".join(logger.lines)[:300]
    logger.lines.clear()
    raise ModelFileError(f"{failure} ({details})" if details else failure)
