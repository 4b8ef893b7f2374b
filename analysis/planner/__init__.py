"""Does a model fit, with how long a context and how many experts, and how fast can it decode?"""

from moiety.analysis.planner.cards import Card
from moiety.analysis.planner.plan import MemoryPlan, plan

__all__ = ["Card", "MemoryPlan", "plan"]
