"""Settings of torch under which a run repeats bit by bit, and a GPU agrees with a CPU to float32 precision."""

from __future__ import annotations

import os


def make_reproducible(device: str) -> None:
    """Set them for the whole process; call this before the device is first used.

    float32 means float32: by default cuDNN uses TF32 (10 bits of mantissa) for convolutions, the patch embedding among them.
    """
    import torch

    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
        torch.backends.cudnn.allow_tf32 = False
        # the gradients of these two kernels of attention add up in any order
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # it helps to find faults, and costs a pass each time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch's types lack it
    torch.backends.mha.set_fastpath_enabled(False)  # its bits depend on grad mode
