"""How a process ends that trained beside others: together with them, and without gloo's threads aborting it.

What is trained, and the exit code, is the business of whoever calls.
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
    """Wait for the other processes of the group, then leave it; gloo now and then aborts one whose neighbour has gone.

    Does nothing without a group, or with one that is not gloo's. To be called on all processes.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo":
        dist.barrier()
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process with an exit code as ``sys.exit`` does; among several on CPUs skip the interpreter's clean-up.

    A thread of gloo may still hold tensors, even after the group was destroyed, because a wrapped model keeps it alive.
    Their release needs the interpreter, and aborts the process (SIGABRT, exit code -6) where that is being cleaned up:
    a launcher then calls a training failed that was complete. So threads are waited for, exit functions run and output
    is flushed as usual, and the rest is left to the system.
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
