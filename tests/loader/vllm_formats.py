"""Run by vLLM's interpreter: loads every model in a folder by vLLM's own loader and by `mball`, and compares.

Prints a JSON object of every rank: by model, the number of tensors and bytes compared, those that differ, and by which
format the tensors were read. Arguments: the folder, one of its models, the number of ranks, and 0.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from vllm import _custom_ops
from vllm.config import set_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.distributed import init_distributed_environment
from vllm.distributed.parallel_state import destroy_model_parallel, ensure_model_parallel_initialized
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import utils
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.models import registry
from vllm.plugins import load_general_plugins

import mball.loader.vllm_format as vllm_format
from mball.loader.checkpoint import Checkpoint
from mball.loader.lazy_stream import LazyStream

# The weights as they are loaded, not a packed copy of them.
_custom_ops._supports_onednn = False
utils.check_cpu_sgl_kernel = lambda *shape: False
# As vLLM's worker does where there is no accelerator.
torch.accelerator.empty_cache = lambda: None
# What an architecture is is found out here, not by a process of its own that imports all of vLLM: six seconds each.
registry._run_in_subprocess = lambda find: find()


def config_of(folder: Path, ranks: int) -> Any:
    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        kv_cache_memory_bytes=1 << 24,
        tensor_parallel_size=ranks,
        distributed_executor_backend="mp" if ranks > 1 else None,
    )
    return arguments.create_engine_config()


def load(config: Any, load_format: str, ranks: int) -> dict[str, torch.Tensor]:
    with set_current_vllm_config(config):
        # A model of experts has one group more, and layers are known by their names.
        destroy_model_parallel()
        ensure_model_parallel_initialized(ranks, 1)
        config.compilation_config.static_forward_context.clear()
        model = get_model(vllm_config=config, load_config=LoadConfig(load_format=load_format))
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def main(models: Path, first: Path, ranks: int, rank: int) -> dict[str, Any]:
    load_general_plugins()
    reads: list[str] = []
    streams: list[LazyStream] = []
    read = vllm_format.read

    def counted(files: list[Path], device: torch.device) -> Any:
        reads.extend(file.name for file in files)
        return read(files, device)

    def lazy(checkpoint: Checkpoint, *arguments: Any) -> LazyStream:
        reads.extend(shard.path.name for shard in checkpoint.shards)
        streams.append(LazyStream(checkpoint, *arguments))
        return streams[-1]

    vllm_format.read, vllm_format.LazyStream = counted, lazy
    logging.getLogger("mball").setLevel(logging.INFO)
    told: dict[str, Any] = {}
    with set_current_vllm_config(config_of(first, ranks)):
        init_distributed_environment(ranks, rank, f"file://{models}/rendezvous{ranks}", rank, "gloo")
    for folder in sorted(path for path in models.iterdir() if path.is_dir()):
        reads.clear()
        streams.clear()
        config = config_of(folder, ranks)
        ours = load(config, "mball", ranks)
        by = sorted(reads)
        theirs = load(config, "auto", ranks)
        differ = [name for name in theirs if name not in ours or not torch.equal(ours[name], theirs[name])]
        nbytes = sum(tensor.nbytes for tensor in theirs.values())
        told[folder.name] = {
            "tensors": len(theirs),
            "bytes": nbytes,
            "differ": differ,
            "missing": sorted(ours.keys() ^ theirs.keys()),
            "read": by,
            "read_bytes": sum(stream.read_bytes for stream in streams),
            "stored_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "read_by_auto": len(reads) - len(by),
        }
    return told


def of_rank(number: int) -> subprocess.Popen[str]:
    command = [sys.executable, *sys.argv[:4], str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


if __name__ == "__main__":
    count, mine = int(sys.argv[3]), int(sys.argv[4])
    others = [of_rank(number) for number in range(1, count if mine == 0 else 0)]
    found = [main(Path(sys.argv[1]), Path(sys.argv[2]), count, mine)]
    for other in others:
        found += json.loads(other.communicate(timeout=120)[0].splitlines()[-1])
    print(json.dumps(found))  # noqa: T201
