"""Arbitrage: speculation by steps of reasoning, above two engines (arXiv 2512.05033). **Lossy.**

A draft model writes a step, up to a separator. A router, which has learnt where the target would do
*better*, gives the step a score; above a threshold the target writes it instead, behind the same
text. Answers are neither model's: what is saved is the target's time on steps that it would not
improve.

``steps`` has the nouns and what the router reads, ``arbiter`` the algorithm, ``engines`` and
``routers`` what is asked over HTTP, ``local`` the same in this process, ``server`` OpenAI's API
above it all, ``labels`` what routers learn from.

What is written is shared as text, never as ids: the models may have different tokenizers.
"""
