"""What MBALL and vLLM's processes call each other's parts by."""

SLEEP_ENVIRONMENT = "MBALL_VLLM_SLEEP"
"""Set to 1 for engines that MBALL starts: elsewhere vLLM keeps the sleep mode that it has."""

CPU_WORKER = "mball.memory.vllm_cpu.SleepingCpuWorker"
"""For vLLM's option `worker_cls` on the CPU."""

CUDA_EXTENSION = "mball.memory.vllm_cuda.CudaRpc"
"""For its option `worker_extension_cls` on a GPU."""

SERVER = "mball.server.worker.vllm_server"
"""The module that runs vLLM's server."""

LOAD_FORMAT = "mball"
"""For its option `load_format`."""
