"""A small executor for draft models, independent of vLLM.

``model.py``     a Hugging Face decoder as addressable layers
``cache.py``     its paged KV cache, by request
``passes.py``    the rows of a pass, and attention over pages
``executor.py``  forward passes over texts and tree levels of a batch
``shapes.py``    which tokens the next level holds: RSD-C, RSD-S, SpecTr, best first
"""
