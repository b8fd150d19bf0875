"""How a process ends that trained with others: together with them, and without being aborted by threads of gloo.

The caller decides what is trained and what the exit code is.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn

import torch
import torch.distributed as dist


def part() -> None:
    """Wait for the other processes of the group, then leave it; gloo may abort a process whose neighbour has gone.

    Does nothing without a group, or with another backend than gloo. Call it on all processes.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.barrier()
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process with an exit code like ``sys.exit``; with several on CPUs, skip the interpreter's clean-up.

    A thread of gloo may still hold tensors, even after the group was destroyed, because a wrapped model keeps it alive.
    Their release needs the interpreter. While that is cleaned up, it aborts the process (SIGABRT, exit code -6), and a
    launcher reports a complete training as failed. So threads are joined, exit functions run and output is flushed as
    usual, and the rest is left to the system.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.cuda.is_available():
        sys.exit(code)
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
