"""The process group of a run's workers, whose store listens only on the address by which Ray knows the node.

torch's own rendezvous listens on all interfaces, and whoever reaches its store can change what the workers tell each other.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import ray
from ray.train.backend import Backend
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is documented

_store: list[TCPStore] = []
"""Keeps the store of rank 0 alive: it serves the other workers until the process ends."""


class NoProcessGroup(TorchConfig):
    """The `torch_config` of a TorchTrainer whose training function calls `join_process_group` itself."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _NoProcessGroupBackend


class _NoProcessGroupBackend(Backend):
    share_cuda_visible_devices = True


def join_process_group(rank: int, world_size: int, device: str, timeout_s: int) -> None:
    """Join the process group of all workers. Each worker calls this once, in its training function.

    The group ends with its processes. Destroying it first, as Ray's own backend does, would wait for a stopped worker.
    """
    timeout = timedelta(seconds=timeout_s)
    address, port = broadcast_from_rank_zero(_serve(world_size) if rank == 0 else None)
    store = _store[0] if rank == 0 else TCPStore(address, port, world_size, timeout=timeout)
    backend = "nccl" if device.startswith("cuda") else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _serve(world_size: int) -> tuple[str, int]:
    """Start the store in this process. Return its address and port."""
    address = ray.util.get_node_ip_address()
    listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    port = listener.getsockname()[1]
    _store[:] = [TCPStore(address, port, world_size, True, wait_for_workers=False, master_listen_fd=listener.detach())]
    return address, port
