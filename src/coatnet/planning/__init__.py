"""Memory, duration and launch command of a training on many GPUs, estimated before it starts."""

from coatnet.planning.cluster_plan import TrainingPlan as TrainingPlan
from coatnet.planning.cluster_plan import plan_training as plan_training

__all__ = ["TrainingPlan", "plan_training"]
