"""A group of workers of whom one dies while they meet."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ray.train.backend import Backend, BackendConfig

from lgm_dist.cluster.rendezvous import OwnAddress, _Rendezvous


class DiesOnce(OwnAddress):
    """The last worker of the first group dies while they meet; the file `init_method` says that it has."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Deadly


class _Deadly(_Rendezvous):
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, DiesOnce)
        met = Path(backend_config.init_method)
        if not met.exists():
            met.touch()
            worker_group.execute_single_async(len(worker_group) - 1, os._exit, 1)
        super().on_start(worker_group, backend_config)
