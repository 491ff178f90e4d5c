"""Drafts from text that already exists: corpora on disk, and what was said before."""
