"""Speed and memory, measured: `python -m rocl_jax.benchmark`."""
