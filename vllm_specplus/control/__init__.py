"""How much to draft: decided every step, for every request, by measured cost.

    acceptance   probability that a node becomes text, learnt from the text itself
    cost         seconds of a target step as a function of its rows
    budget       which nodes to verify: goodput, threshold or all
    memory       what speculation needs, and how many rows fit
    requests     what a single request may ask for
    controller   puts them together; the only part the engine talks to

Pure NumPy, no vLLM: the simulator in ``benchmarks/`` runs this very code.
"""
