"""Robust and small neural networks: RoCL, adversarial training, HYDRA.

`rocl_jax.types` is the page to read first.
"""

from rocl_jax import environment

environment.prepare()
