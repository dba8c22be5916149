"""From a model and a recipe to a verified result: the stages in order."""

from secateur.graphops.pipeline.inspection import inspect
from secateur.graphops.pipeline.profiling import profile
from secateur.graphops.pipeline.pruning import prune

__all__ = ["inspect", "profile", "prune"]
