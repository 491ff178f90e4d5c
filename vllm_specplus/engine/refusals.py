"""Errors of our own HTTP routes, as OpenAI's clients read them."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse


def error_body(message: str, status: int) -> dict[str, Any]:
    """What says in one sentence what is wrong, in an answer of ``status`` or in an event."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def refusal(message: str, status: int) -> JSONResponse:
    """An answer of ``status`` that says so."""
    return JSONResponse(error_body(message, status), status)
