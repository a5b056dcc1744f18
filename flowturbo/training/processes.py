"""One process or many, on whatever device there is, through 🤗 Accelerate.

`torchrun` and `accelerate launch` tell each process its place by environment variables; Accelerate reads them, opens
the process group (NCCL between GPUs, gloo between CPUs) and names the device.
"""

from __future__ import annotations

import os
import sys
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import distributed

from runtime.system.errors import TrainingError

DeviceName = Literal["auto", "cpu", "cuda"]


def join_processes(device: DeviceName) -> Accelerator:
    """Return this process's place among those that were started together; "auto" is the GPU where there is one.

    Raises:
        TrainingError: no CUDA device, or a launcher set up for sharded training.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            "--device cuda: this PyTorch sees no CUDA device",
            allowed="auto, cpu",
            remedy="install a CUDA build of torch and a driver, or leave --device out",
        )
    # Without `cpu`, Accelerate takes CPU processes for independent runs.
    on_cpu = device == "cpu" or (device == "auto" and not torch.accelerator.is_available())
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no",  # the loop has its own autocast, which leaves losses and optimiser in float32
    )
    unsupported = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in unsupported:
        raise TrainingError(
            f"the launcher asks for {accelerator.distributed_type.value}",
            allowed="plain data parallelism: every process holds the whole network",
            remedy="use torchrun, or run `accelerate config` again without it",
        )
    return accelerator


def leave_processes() -> None:
    """End a command that ran on several processes: wait for all of them, then end this one at once.

    PyTorch's communication and autograd threads race the interpreter's shutdown, and sometimes a finished process
    hangs there for ever (pytorch/pytorch#190489). All files are written and closed by now, so it skips the shutdown.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    distributed.barrier()
    if distributed.get_backend() == "nccl":
        distributed.destroy_process_group()  # it aborts kernels that still run, and warns where it was not asked to
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
