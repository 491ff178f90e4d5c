"""Image autoregressive models: what they are, apart from any engine."""
