"""Errors of our own HTTP routes, as OpenAI's clients read them."""

from __future__ import annotations

from fastapi.responses import JSONResponse


def refusal(message: str, status: int) -> JSONResponse:
    """An answer of ``status`` that says what is wrong in one sentence."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": status}
    return JSONResponse({"error": error}, status)
