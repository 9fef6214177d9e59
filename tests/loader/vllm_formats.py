"""Run by vLLM's interpreter: loads every model in a folder by vLLM's own loader and by `mball`, and compares.

Prints a JSON object: by model, the number of tensors and bytes compared, those that differ, and by which format the
tensors were read.
"""

from __future__ import annotations

import json
import logging
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

# The weights as they are loaded, not a packed copy of them.
_custom_ops._supports_onednn = False
utils.check_cpu_sgl_kernel = lambda *shape: False
# As vLLM's worker does where there is no accelerator.
torch.accelerator.empty_cache = lambda: None
# What an architecture is is found out here, not by a process of its own that imports all of vLLM: six seconds each.
registry._run_in_subprocess = lambda find: find()


def config_of(folder: Path) -> Any:
    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, kv_cache_memory_bytes=1 << 24
    )
    return arguments.create_engine_config()


def load(config: Any, load_format: str) -> dict[str, torch.Tensor]:
    with set_current_vllm_config(config):
        # A model of experts has one group more, and layers are known by their names.
        destroy_model_parallel()
        ensure_model_parallel_initialized(1, 1)
        config.compilation_config.static_forward_context.clear()
        model = get_model(vllm_config=config, load_config=LoadConfig(load_format=load_format))
    return {name: tensor.detach().clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def main() -> None:
    load_general_plugins()
    reads: list[str] = []
    read = vllm_format.read

    def counted(files: list[Path], device: torch.device) -> Any:
        reads.extend(file.name for file in files)
        return read(files, device)

    vllm_format.read = counted
    logging.getLogger("mball").setLevel(logging.INFO)
    told: dict[str, Any] = {}
    with set_current_vllm_config(config_of(Path(sys.argv[2]))):
        init_distributed_environment(1, 0, f"file://{sys.argv[1]}/rendezvous", 0, "gloo")
    for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
        reads.clear()
        config = config_of(folder)
        ours = load(config, "mball")
        by = sorted(reads)
        theirs = load(config, "auto")
        differ = [name for name in theirs if name not in ours or not torch.equal(ours[name], theirs[name])]
        nbytes = sum(tensor.nbytes for tensor in theirs.values())
        told[folder.name] = {
            "tensors": len(theirs),
            "bytes": nbytes,
            "differ": differ,
            "missing": sorted(ours.keys() ^ theirs.keys()),
            "read": by,
            "read_by_auto": len(reads) - len(by),
        }
    print(json.dumps(told))  # noqa: T201


if __name__ == "__main__":
    main()
