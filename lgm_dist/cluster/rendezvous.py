"""How the workers of a run meet: a process group whose store listens on the address by which Ray knows the node.

torch's own store listens on all interfaces, and whoever reaches it can change what the workers tell each other.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is documented

_servers: list[TCPStore] = []
"""Rank 0's, which serves for as long as it is held."""


class OwnAddress(TorchConfig):
    """For TorchTrainer. One worker has nobody to meet, and no process group."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Rendezvous


class _Rendezvous(Backend):
    """The group ends with its processes: to take leave first, as Ray's own does, would wait for a worker that is stopped."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Raises what ended a worker meanwhile, and GetTimeoutError for one that is stopped."""
        assert isinstance(backend_config, TorchConfig)
        size, limit = len(worker_group), backend_config.timeout_s
        if size == 1:
            return
        try:
            place = ray.get(worker_group.execute_single_async(0, _listen, size), timeout=limit)
            how = (size, place, backend_config.backend, limit)
            met = [worker_group.execute_single_async(rank, _meet, rank, *how) for rank in range(size)]
            ray.get(met, timeout=limit)
        except BaseException:
            worker_group._clear_state()  # else Ray Train takes it for started, and never gives its resources back
            raise


def _listen(size: int) -> tuple[str, int]:
    """Starts the store in this process; its address and port."""
    address = ray.util.get_node_ip_address()
    listener = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    port = listener.getsockname()[1]
    server = TCPStore(address, port, size, True, wait_for_workers=False, master_listen_fd=listener.detach())
    _servers[:] = [server]
    return address, port


def _meet(rank: int, size: int, place: tuple[str, int], backend: str, seconds: int) -> None:
    limit = timedelta(seconds=seconds)
    store = _servers[0] if rank == 0 else TCPStore(*place, size, timeout=limit)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
