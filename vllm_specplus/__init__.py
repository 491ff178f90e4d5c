"""Speculative decoding methods for stock vLLM: draft trees, verified losslessly."""

__version__ = "0.1.0"
