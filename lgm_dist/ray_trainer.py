"""Ray Train's trainer without those of its actors that have nothing to do here: each start waits for them."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingPolicy


class Trainer(TorchTrainer):
    """No actor for Ray Data and, `alone` in a Ray of its own, none to clean up after a controller that has died or to ask an
    autoscaler for nodes."""

    def __init__(self, *arguments: Any, alone: bool, **settings: Any) -> None:
        self._alone = alone
        super().__init__(*arguments, **settings)

    def _create_default_callbacks(self) -> list[Any]:
        idle = (DatasetsCallback, *((PlacementGroupCleanerCallback,) if self._alone else ()))
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # Ray's annotations show the old class
        return [callback for callback in callbacks if not isinstance(callback, idle)]

    def _initialize_and_run_controller(self, *, scaling_policy: ScalingPolicy, **settings: Any) -> Any:
        if self._alone and type(scaling_policy) is FixedScalingPolicy:
            scaling_policy = _NoAutoscaler(self.scaling_config)  # type: ignore[arg-type]  # as above
        return super()._initialize_and_run_controller(scaling_policy=scaling_policy, **settings)  # type: ignore[misc]


class _NoAutoscaler(FixedScalingPolicy):
    def after_controller_start(self, train_run_context: Any) -> None:
        """Asks for no nodes, so that there is nothing to take back at the end."""

    def _maybe_send_resource_request(self) -> None:
        """As above."""
