"""What speculation will bring on hardware that is not here: a roofline model of rounds.

Nothing here imports torch or vLLM, reads weights or asks a device. ``sizes`` reads what a model is
from its config.json, ``devices`` holds data sheets, ``software`` what engines add to them,
``passes`` turns a forward pass into seconds, ``rounds`` a drafting method into passes, and ``plan``
compares. How far it is off is measured by ``benchmarks/plan_check.py``; docs/plan.md says more.
"""
