"""Acceptance rules: which nodes of a draft become text.

``registry`` finds a rule's class by its name; ``rules`` says what a rule is. The classes are in
``lossless`` (draws of the target, no draft distribution), ``sampled`` (nodes that a draft model
drew, losslessly), ``relaxed`` (nodes in the place of the target's draws) and
``relaxed_sampling`` (probability borrowed from similar tokens); ``chains`` is a fast path of the
last two and of one lossless rule.
"""
