"""The mixed-integer program in CVXPY: runs inside the worker process, on plain arrays, and answers with plain arrays."""

from __future__ import annotations

from collections.abc import Mapping

import cvxpy as cp
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

Arrays = Mapping[str, npt.NDArray[np.generic]]


def solve_model(data: Arrays) -> dict[str, npt.NDArray[np.generic]]:
    """Choose one column per head at least cost.

    Args:
        data: columns `cost` float64 [X], `head` int64 [X], `rows` float64 [M, X] with `rhs` float64 [M]; under a
            rules-per-layer limit also `link` int64 [X] (which y a column needs), `layer` int64 [Y] and `rule_limit`;
            `rel_gap`, `abs_gap`, `time_limit_s`.

    Returns:
        `status` (CVXPY's), `x` float64 [X] (empty without an answer) and `bound`, the solver's lower bound.
    """
    x = cp.Variable(len(data["cost"]), boolean=True)
    constraints: list[cp.Constraint] = [_sum_by(data["head"]) @ x == 1, cp.Constant(data["rows"]) @ x <= data["rhs"]]
    limited = "link" in data
    if limited:
        y = cp.Variable(len(data["layer"]), boolean=True)
        needs = sp.csr_array((np.ones(x.size), (np.arange(x.size), data["link"])), shape=(x.size, y.size))
        # The strong link, one row per column: `sum_h x <= H y` has a far weaker relaxation (15 s against 3 s).
        constraints += [x <= needs @ y, _sum_by(data["layer"]) @ y <= float(data["rule_limit"])]
    problem = cp.Problem(cp.Minimize(data["cost"] @ x), constraints)
    # HiGHS's presolve costs more than it saves where there is no rules-per-layer limit: 10 s against 5 s.
    problem.solve(  # type: ignore[no-untyped-call]  # cvxpy is typed in part only
        solver=cp.HIGHS, presolve="choose" if limited else "off", **_options(data)
    )
    bound = getattr(problem.solver_stats.extra_stats, "mip_dual_bound", -np.inf)
    answer = np.zeros(0) if x.value is None else np.asarray(x.value)
    return {"status": np.array(problem.status), "x": answer, "bound": np.array(float(bound))}


def _options(data: Arrays) -> dict[str, float | int | str]:
    """One thread and a fixed seed: the same input gives the same output."""
    return {
        "mip_rel_gap": float(data["rel_gap"]),
        "mip_abs_gap": float(data["abs_gap"]),
        "time_limit": float(data["time_limit_s"]),
        "threads": 1,
        "random_seed": 0,
        "mip_feasibility_tolerance": 1e-7,
        "primal_feasibility_tolerance": 1e-8,
    }


def _sum_by(part: npt.NDArray[np.generic]) -> sp.csr_array:
    """Matrix that sums entries by their part: [parts, len(part)]; parts are numbered from 0 without holes."""
    return sp.csr_array((np.ones(len(part)), (part, np.arange(len(part)))))
