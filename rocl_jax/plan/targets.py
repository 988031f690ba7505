"""What XLA must know of a GPU to compile for it where there is none.

Numbers of A100, H100 and H200 are those of openxla/xla's own descriptions
(`xla/backends/gpu/target_config/specs`), of L4 and L40S NVIDIA's data sheets'
and CUDA's programming guide's for compute capability 8.9.
"""

from typing import NamedTuple

from rocl_jax.plan.chips import GPUS


class _Gpu(NamedTuple):
  """A GPU: its name, and of each multiprocessor ('core') what XLA asks for.

  Attributes:
    name: as the driver tells it.
    capability: compute capability.
    cores: multiprocessors.
    lanes: float32 units of a core.
    clock: GHz.
    l2: MiB of cache.
    memory: bytes.
    shared: bytes of shared memory of a core.
    threads: that a core holds at most.
  """

  name: str
  capability: tuple[int, int]
  cores: int
  lanes: int
  clock: float
  l2: int
  memory: int
  shared: int
  threads: int


_A100 = _Gpu(
  'NVIDIA A100-SXM4-40GB',
  capability=(8, 0),
  cores=108,
  lanes=64,
  clock=1.41,
  l2=40,
  memory=42_331_013_120,
  shared=167_936,
  threads=2048,
)
_H100 = _Gpu(
  'NVIDIA H100 80GB HBM3',
  capability=(9, 0),
  cores=132,
  lanes=128,
  clock=1.98,
  l2=50,
  memory=84_942_979_072,
  shared=233_472,
  threads=2048,
)
_L4 = _Gpu(
  'NVIDIA L4',
  capability=(8, 9),
  cores=58,
  lanes=128,
  clock=2.04,
  l2=48,
  memory=24_152_899_584,
  shared=102_400,
  threads=1536,
)
_GPUS = {
  'a100': _A100,
  'a100-80': _A100._replace(
    name='NVIDIA A100-SXM4-80GB', memory=85_100_068_864
  ),
  'h100': _H100,
  'h200': _H100._replace(
    name='NVIDIA H200 141GB HBM3e', memory=151_397_597_184
  ),
  'l4': _L4,
  'l40s': _L4._replace(
    name='NVIDIA L40S', cores=142, clock=2.52, l2=96, memory=48_305_799_168
  ),
}

# The versions are those that jaxlib's wheels for CUDA 13 are built for.
_TEXT = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared}
  shared_memory_per_block_optin: {optin}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{
    major: {gpu.capability[0]}
    minor: {gpu.capability[1]}
    feature_extension: {features}
  }}
  dnn_version: "9.20.0"
  runtime_version: "13.0.0"
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
device_description_str: "{gpu.name}"
"""


def target_config(kind: str) -> str:
  """The description of a kind of GPU, such as 'h100', for XLA's topologies."""
  gpu = _GPUS[kind]
  return _TEXT.format(
    gpu=gpu,
    optin=gpu.shared - 1024,
    bandwidth=int(1e9 * GPUS[kind].bandwidth),
    l2=gpu.l2 * 2**20,
    features='ACCELERATED_FEATURES' if gpu.capability >= (9, 0) else 'NONE',
  )
