"""Four CPU devices, so that sharding is tested where there is one machine.

Programs that several tests compile are compiled once a session.
"""

import tempfile

import jax

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)

_CACHE = tempfile.TemporaryDirectory(prefix='rocl_jax_tests')
jax.config.update('jax_compilation_cache_dir', _CACHE.name)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
