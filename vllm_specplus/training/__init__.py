"""Training of drafts: distillation of a small model from its target."""
