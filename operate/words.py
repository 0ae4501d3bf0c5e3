"""How the operator's commands put things: refusals and durations."""

from __future__ import annotations

from datetime import datetime

from comfy_utils import error_code, one_line


def refusal(error: Exception, service: str) -> str:
    """An error in one line; of a refused access only what is not allowed."""
    code = error_code(error)
    if "AccessDenied" in code or code in ("UnauthorizedOperation", "AuthorizationError"):
        return f"not allowed: {service}:{getattr(error, 'operation_name', '')}"
    return one_line(error)


def duration(seconds: float) -> str:
    """`3.2 s`, `4 min 5 s`, `2 h 3 min`."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def moment(text: str) -> float:
    """An ISO 8601 time as seconds since 1970."""
    return datetime.fromisoformat(text).timestamp()
