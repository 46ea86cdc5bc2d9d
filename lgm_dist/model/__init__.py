"""The network, and nothing about distribution, files or logging."""

from lgm_dist.model.lgmnet import LGMNet, match, matching_features
from lgm_dist.model.norm import AllReduce, Norm
from lgm_dist.model.tensorflow import load_tf_variables

__all__ = ["AllReduce", "LGMNet", "Norm", "load_tf_variables", "match", "matching_features"]
