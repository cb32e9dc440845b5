"""Run a function on several ranks: real processes, gloo, one thread each.

What Inductor would compile runs operator by operator, as the `interpreted` fixture does it: compiled in no time.
"""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.compiling import by_operator


def run_on(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of `function(rank, *args)` in rank order; a failing rank's traceback is raised."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_rank, args=(r, ranks, port, queue, function, args)) for r in range(ranks)]
    for p in processes:
        p.start()
    results = []
    for _ in processes:
        rank, ok, value = queue.get()
        if not ok:
            for p in processes:  # the others wait for this one
                p.kill()
            raise AssertionError(value)
        results.append((rank, torch.load(io.BytesIO(value), weights_only=True)))
    for p in processes:
        p.join()
    return [value for _, value in sorted(results, key=lambda r: r[0])]


def _rank(rank: int, ranks: int, port: int, queue: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    try:
        from qcompile.backend import inductor

        inductor.compile_fx_inner = by_operator
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        with torch.compiler.config.patch(force_disable_caches=True):
            value = function(rank, *args)
        dist.barrier()
        saved = io.BytesIO()  # a tensor itself would be shared memory of a process that ends
        torch.save(value, saved)
        queue.put((rank, True, saved.getvalue()))
    except BaseException:
        queue.put((rank, False, f"rank {rank}:\n{traceback.format_exc()}"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
