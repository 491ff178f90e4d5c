"""How much to draft: decided every step, for every request, by measured cost.

    settings     what a user may choose
    acceptance   probability that a node becomes text, learnt from the text itself
    outcomes     what was drafted, and how it compares with what became text
    cost         seconds of a target step as a function of its rows, and of drafting for it
    slots        rows of arrays that belong to requests
    levels       the levels of a draft model's trees
    budget       the most productive number of nodes
    ledger       what each request's tokens took, and would have taken undrafted
    objectives   for whom a step may become longer
    switch       when speculation is off, and what keeps that decision honest
    policies     fixed, threshold and goodput, by all of that
    memory       what speculation needs, and how many rows fit
    requests     what a single request may ask for
    controller   puts them together; the only part the engine talks to

Pure NumPy, no vLLM: the simulator in ``benchmarks/`` runs this very code.
"""
