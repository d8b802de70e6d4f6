"""Planning: what a cache costs and holds, and what would make it fit. Torch-free; nothing is allocated."""

from kvcfg.planning.fitting import Fit, fit
from kvcfg.planning.plan_text import plan_table
from kvcfg.planning.plans import Plan, plan

__all__ = ["Fit", "Plan", "fit", "plan", "plan_table"]
