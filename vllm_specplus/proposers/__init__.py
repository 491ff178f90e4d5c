"""Drafting methods: every file is one, has its name, and holds its configuration and its proposer.

``vllm_specplus.registry`` finds them by their names; what several of them share lies in
``vllm_specplus.drafting``.
"""
