"""Scheduling policies: which requests run in the next step, and how many tokens of each. No tensor is seen here."""

from moa.runner.policies.job import Job
from moa.runner.policies.order import ORDERS, QueueOrder, get_order
from moa.runner.policies.registry import POLICIES, Policy, get_policy
from moa.runner.policies.turn import Host, Limits, Turn

__all__ = ["ORDERS", "POLICIES", "Host", "Job", "Limits", "Policy", "QueueOrder", "Turn", "get_order", "get_policy"]
