"""Ray Train's trainer without those of its actors that have nothing to do here, each of which a start waits for; it does not
wait for ever in a Ray that has ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingPolicy

_POLL_SECONDS = 0.5


class Trainer(TorchTrainer):
    """No actor for Ray Data and, `alone` in a Ray of its own, none to clean up after a controller that has died or to ask an
    autoscaler for nodes.

    `watch` is called now and then while it trains; what it raises ends `fit`. Signals are left to their handlers.
    """

    def __init__(self, *arguments: Any, alone: bool, watch: Callable[[], None], **settings: Any) -> None:
        self._alone, self._watch = alone, watch
        super().__init__(*arguments, **settings)

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback, *((PlacementGroupCleanerCallback,) if self._alone else ()))
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # Ray's annotations show the old class
        return [callback for callback in callbacks if not isinstance(callback, idle)]

    def _initialize_and_run_controller(self, *, scaling_policy: ScalingPolicy, **settings: Any) -> Any:
        """Ray's own waits in calls that do not come back from a Ray that has ended, and takes SIGINT for itself."""
        if self._alone and type(scaling_policy) is FixedScalingPolicy:
            scaling_policy = _NoAutoscaler(self.scaling_config)  # type: ignore[arg-type]  # as above
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}  # type: ignore[attr-defined]
        environment = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0"} | get_env_vars_to_propagate()
        actor = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": environment})(TrainController)
        controller: Any = actor.remote(scaling_policy=scaling_policy, **settings)
        self._answer(controller.run.remote())
        return self._answer(controller.get_result.remote())

    def _answer(self, call: Any) -> Any:
        while not ray.wait([call], timeout=_POLL_SECONDS)[0]:
            self._watch()
        return ray.get(call)


class _NoAutoscaler(FixedScalingPolicy):
    def after_controller_start(self, train_run_context: Any) -> None:
        """Asks for no nodes, so that there is nothing to take back at the end."""

    def _maybe_send_resource_request(self) -> None:
        """As above."""
