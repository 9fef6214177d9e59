"""What MBALL and vLLM's processes call each other's parts by."""

SLEEP_ENVIRONMENT = "MBALL_VLLM_SLEEP"
"""Set to 1 for engines that MBALL starts: elsewhere vLLM keeps the sleep mode that it has."""

FORK_ENVIRONMENT = "MBALL_VLLM_FORK"
"""Set to 1 where vLLM's engine is to be forked from its server on the CPU, too."""

METHOD_ENVIRONMENT = "VLLM_WORKER_MULTIPROC_METHOD"
"""vLLM's own: how it begins the engine's processes."""

SERVER_ENVIRONMENT = "MBALL_VLLM_SERVER_AT"
"""When vLLM's server had been imported, by the monotonic clock; set by its process for those of its engine."""

TRITON_ENVIRONMENT = "TRITON_CACHE_DIR"
"""Triton's own: where it keeps the kernels that it compiles."""

CPU_WORKER = "mball.memory.vllm_cpu.SleepingCpuWorker"
"""For vLLM's option `worker_cls` on the CPU."""

CUDA_EXTENSION = "mball.memory.vllm_cuda.CudaRpc"
"""For its option `worker_extension_cls` on a GPU."""

TENANT_MIDDLEWARE = "mball.server.worker.vllm_tenants.TenantSalt"
SERVER = "mball.server.worker.vllm_server"
"""The module that runs vLLM's server."""

LOAD_FORMAT = "mball"
"""For its option `load_format`."""

KV_TIER = "mball"
"""The type of its secondary tier for KV blocks."""

KV_TIER_MODULE = "mball.server.worker.vllm_tiers"
"""Where that tier's class is."""

KV_TIER_CLASS = "StoreTier"

HOST_SPEC = ("HostTieringSpec", "mball.server.worker.vllm_host_kv")
"""On the CPU, the class of vLLM's offloading spec, and its module."""

KV_ENVIRONMENT = "MBALL_VLLM_KV"
"""The socket by which an engine that MBALL started reaches the swap store; not set where its KV is not kept."""

KV_IDENTITY_ENVIRONMENT = "MBALL_VLLM_KV_IDENTITY"
"""SHA-256 in hexadecimal of what the engine computes KV with."""
