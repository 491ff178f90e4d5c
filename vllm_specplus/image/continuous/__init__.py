"""Speculative decoding of continuous tokens: latents that a small diffusion draws one by one.

``chain.py``       the denoising chain of a latent, and its shared noise
``acceptance.py``  judging a drafted latent, and what replaces a rejected one
``decoding.py``    generation, plain and speculative, over any two causal models
``head.py``        MAR's diffusion head
``causal.py``      a causal model of latents
``masked.py``      MAR: masked models of latents, and what verifying them keeps
"""
