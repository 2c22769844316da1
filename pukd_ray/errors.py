"""The one exception for runs that cannot go on for a reason their user can mend, and what went wrong in others."""

import re

import ray


class RunError(RuntimeError):
    """The run stops here; the message says what is wrong and what to do."""


def cause_of(error: Exception) -> str:
    """What went wrong, in one line; Ray's errors carry the remote traceback as text, the cause first."""
    if isinstance(error, RunError):
        # What a worker raised comes as Ray's error too: with a traceback for a text, and Ray's advice after the cause.
        return str(error.cause).splitlines()[0] if isinstance(error, ray.exceptions.RayTaskError) else str(error)
    lines = str(error).splitlines()
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Died)\b", line)]
    named = [line for line in named if not line.startswith("ray.exceptions")]
    if isinstance(error, ray.exceptions.RayError) and named:
        return named[0]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
