"""The network: backbone, generator and head by name. Nothing about distribution, files or logging."""

from lgm_dist.model.lgmnet import LGMNet, build_model, upgrade_state_dict
from lgm_dist.model.norm import AllReduce, Norm
from lgm_dist.model.parts import register_backbone, register_generator, register_head
from lgm_dist.model.tensorflow import load_tf_variables

__all__ = [
    "AllReduce",
    "LGMNet",
    "Norm",
    "build_model",
    "load_tf_variables",
    "register_backbone",
    "register_generator",
    "register_head",
    "upgrade_state_dict",
]
