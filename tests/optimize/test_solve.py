"""The optimizer against enumeration, and its behaviour when the solver is late, dead or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa.errors import InfeasibleError, UsageError
from moa.optimize import greedy as greedy_module
from moa.optimize import milp
from moa.optimize.greedy import greedy
from moa.optimize.instance import Instance, make_instance, undominated
from moa.optimize.lagrangian import relax
from moa.optimize.milp import MilpWorker
from moa.optimize.problem import Assignment, AssignmentProblem, Target, check, fits_budgets
from moa.optimize.solve import TIME_LIMIT_S, solve
from moa.optimize.worker import Message
from moa.spans import Int64Array

MakeProblem = Callable[..., AssignmentProblem]
Enumerate = Callable[[AssignmentProblem, Target], float | None]

seeds = st.integers(0, 2**32 - 1)
limits = st.sampled_from([None, 1, 2, 3])
sizes = st.sampled_from([(1, 1, 3), (2, 2, 4), (1, 4, 5), (4, 1, 3), (1, 3, 5), (2, 2, 1)])


def close(a: float, b: float, problem: AssignmentProblem, target: Target) -> bool:
    spread = float(target.weights @ np.abs(problem.loss).sum(axis=(1, 2, 3)))
    return abs(a - b) <= 1e-7 * spread


@given(seeds, limits, sizes, st.integers(1, 3))
@settings(max_examples=60)
def test_solve_agrees_with_enumeration(
    worker: MilpWorker,
    make_tiny: MakeProblem,
    best_by_enumeration: Enumerate,
    seed: int,
    limit: int | None,
    size: tuple[int, int, int],
    lengths: int,
) -> None:
    layers, kv_heads, rules = size
    problem = make_tiny(seed, limit, lengths, layers, kv_heads, rules)
    for target in (Target.balanced(problem), Target.at_length(problem, lengths - 1)):
        exact = best_by_enumeration(problem, target)
        answer = solve(problem, target, rel_gap=0.0, worker=worker)
        assert exact is not None
        assert close(answer.value, exact, problem, target)
        assert answer.bound <= exact + 1e-7 * abs(exact)
        assert (answer.milp_status, answer.solver) == ("optimal", "highs")


@given(seeds, limits, st.floats(0, 1))
@settings(max_examples=40)
def test_loss_limits_agree_with_enumeration(
    worker: MilpWorker,
    make_tiny: MakeProblem,
    best_by_enumeration: Enumerate,
    seed: int,
    limit: int | None,
    level: float,
) -> None:
    problem = make_tiny(seed, limit, 2)
    ends = [solve(problem, Target.at_length(problem, e), rel_gap=0.0, worker=worker).losses[1] for e in (0, 1)]
    target = Target.at_length(problem, 0, np.array([np.inf, ends[1] + level * (ends[0] - ends[1])]))
    answer = solve(problem, target, rel_gap=0.0, worker=worker)
    exact = best_by_enumeration(problem, target)
    assert exact is not None
    assert close(answer.value, exact, problem, target)


@given(seeds, limits, sizes, st.integers(1, 3))
@settings(max_examples=60)
def test_bound_is_below_and_greedy_above_the_optimum(
    make_tiny: MakeProblem,
    best_by_enumeration: Enumerate,
    seed: int,
    limit: int | None,
    size: tuple[int, int, int],
    lengths: int,
) -> None:
    layers, kv_heads, rules = size
    problem = make_tiny(seed, limit, lengths, layers, kv_heads, rules)
    target = Target.balanced(problem)
    instance, exact = make_instance(problem, target), best_by_enumeration(problem, target)
    assert exact is not None
    optimum = (exact - instance.offset) / instance.scale
    assert relax(instance).bound <= optimum + 1e-7
    picks = greedy(instance)
    assert picks is not None
    assert fits_budgets(problem, picks)
    assert instance.cost_of(picks) >= optimum - 1e-7


@given(seeds, st.sampled_from([None, 1, 2, 3]))
@settings(max_examples=30)
def test_forced_bounds_never_exclude_the_optimum(
    make_tiny: MakeProblem, best_by_enumeration: Enumerate, seed: int, limit: int | None
) -> None:
    """A rule is removed when its forced bound exceeds a known cost: no assignment that uses it may cost less."""
    problem = make_tiny(seed, limit, layers=1, kv_heads=4, rules=4)
    target = Target.balanced(problem)
    instance = make_instance(problem, target)
    forced = relax(instance).forced
    for rule in range(problem.loss.shape[3]):
        loss = problem.loss.copy()
        loss[:, 0, 0, np.arange(loss.shape[3]) != rule] += 1e6 * np.abs(loss).max()
        exact = best_by_enumeration(replace(problem, loss=loss), target)
        assert exact is not None
        assert forced[0, 0, rule] <= (exact - instance.offset) / instance.scale + 1e-6


@given(seeds, st.sampled_from([None, 1, 2, 3]))
@settings(max_examples=30)
def test_dominated_rules_are_not_missed(
    make_tiny: MakeProblem, best_by_enumeration: Enumerate, seed: int, limit: int | None
) -> None:
    problem = make_tiny(seed, limit, layers=1, kv_heads=4, rules=4)
    target = Target.balanced(problem)
    keep = undominated(make_instance(problem, target))
    dear = np.where(keep, problem.loss, 1e6 * np.abs(problem.loss).max())
    assert best_by_enumeration(replace(problem, loss=dear), target) == best_by_enumeration(problem, target)


@pytest.mark.parametrize("limit", [None, 1, 2, 4])
def test_heuristics_alone_come_close(make_realistic: MakeProblem, worker: MilpWorker, limit: int | None) -> None:
    problem = make_realistic(1, 6, 4, 0.4, limit)
    instance = make_instance(problem, Target.balanced(problem))
    answer = solve(problem, worker=worker)
    assert instance.value(relax(instance).bound) <= answer.value * (1 + 1e-9)
    picks = greedy(instance)
    assert picks is not None
    assert answer.value <= instance.value(instance.cost_of(picks)) * (1 + 1e-9)


@pytest.mark.parametrize("limit", [None, 2, 4])
@pytest.mark.parametrize("rel_gap", [0.005, 0.1])
def test_what_is_proved_good_enough_is_not_improved(
    make_realistic: MakeProblem, worker: MilpWorker, monkeypatch: pytest.MonkeyPatch, limit: int | None, rel_gap: float
) -> None:
    problem = make_realistic(5, 6, 8, 0.3, limit)
    target = Target.balanced(problem)
    instance = make_instance(problem, target)
    bound, best_swap = instance.value(relax(instance).bound), greedy_module._best_swap
    tried: list[float] = []

    def spy(instance: Instance, picks: Int64Array) -> Int64Array | None:
        tried.append(instance.value(instance.cost_of(picks)))
        return best_swap(instance, picks)

    monkeypatch.setattr(greedy_module, "_best_swap", spy)
    answer = solve(problem, target, rel_gap=rel_gap, worker=worker, always_milp=False)
    assert all(value - bound > rel_gap * value for value in tried)
    assert answer.gap_ratio <= rel_gap
    assert tried or rel_gap == 0.1 or limit is None  # something is tried until it is proved


@pytest.mark.parametrize("limit", [None, 2, 3])
def test_same_input_gives_the_same_output(make_realistic: MakeProblem, worker: MilpWorker, limit: int | None) -> None:
    problem = make_realistic(2, 4, 4, 0.3, limit)
    first = solve(problem, worker=worker)
    second = solve(problem)
    assert first.rules.tolist() == second.rules.tolist()
    assert (first.value, first.bound, first.solver) == (second.value, second.bound, second.solver)


def test_one_rule_more_per_layer_never_hurts(make_realistic: MakeProblem, worker: MilpWorker) -> None:
    values = [solve(make_realistic(3, 3, 4, 0.3, k), rel_gap=0.0, worker=worker).value for k in (1, 2, 3, None)]
    assert values == sorted(values, reverse=True)


def _still_good(problem: AssignmentProblem, answer: Assignment) -> None:
    check(problem, answer, Target.balanced(problem))
    assert answer.solver in ("lagrangian", "greedy")
    assert answer.bound <= answer.value
    assert answer.gap_ratio < 0.05


def test_tiny_time_limit_still_gives_a_plan_and_says_so(make_realistic: MakeProblem, worker: MilpWorker) -> None:
    problem = make_realistic(4, 16, 8, 0.3)
    answer = solve(problem, time_limit_s=1e-6, worker=worker)
    check(problem, answer, Target.balanced(problem))
    assert answer.milp_status == "not started"
    assert answer.gap_ratio < 0.05


def test_time_limit_of_a_hard_instance_is_kept_within_two_seconds(
    make_realistic: MakeProblem, worker: MilpWorker
) -> None:
    """Four rules per layer of 32 heads: HiGHS alone needs more than a minute."""
    problem = make_realistic(11, 32, 32, 0.3, 4, (4096, 8192, 16384, 32768), 100)
    started = time.monotonic()
    answer = solve(problem, rel_gap=0.0, time_limit_s=4.0, worker=worker)
    assert time.monotonic() - started <= 4.0 + 2.0
    assert answer.milp_status == "time_limit" or answer.milp_status.startswith(("killed", "not started"))
    check(problem, answer, Target.balanced(problem))


def test_worker_that_hangs_is_killed_on_time(make_realistic: MakeProblem, worker: MilpWorker) -> None:
    problem = make_realistic(12, 4, 4, 0.3)
    with MilpWorker() as frozen:
        solve(problem, worker=frozen)
        assert frozen.pid is not None
        os.kill(frozen.pid, signal.SIGSTOP)
        started = time.monotonic()
        answer = solve(problem, time_limit_s=2.0, worker=frozen)
        assert time.monotonic() - started <= 2.0 + 2.0
    assert answer.milp_status.startswith("killed after")
    _still_good(problem, answer)


def test_late_worker_is_killed_and_the_next_solve_starts_another(
    make_realistic: MakeProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_realistic(5, 16, 8, 0.3)
    with MilpWorker() as worker:
        solve(problem, worker=worker)
        first = worker.pid
        with monkeypatch.context() as patch:
            patch.setattr(milp, "GRACE_S", 1e-3 - TIME_LIMIT_S)
            answer = solve(problem, worker=worker)
        assert answer.milp_status.startswith("killed after")
        assert worker.pid is None
        _still_good(problem, answer)
        assert solve(problem, worker=worker).solver == "highs"
        assert worker.pid != first


def test_worker_killed_from_outside_is_survived(make_realistic: MakeProblem) -> None:
    problem = make_realistic(6, 8, 4, 0.3)
    with MilpWorker() as worker:
        worker.ask({"cost": np.zeros(1)}, 60.0)  # nonsense: the answer is a status, the process lives on
        pid = worker.pid
        assert pid is not None
        stop = threading.Timer(0.2, os.kill, (pid, signal.SIGSTOP))
        stop.start()
        stop.join()
        killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
        killer.start()
        answer = solve(problem, worker=worker)
        killer.join()
        assert answer.milp_status == "failed: the solver process died"
        _still_good(problem, answer)


def test_solver_that_cannot_start_is_survived(make_realistic: MakeProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_realistic(7, 4, 4, 0.3)
    for executable in ("/nonexistent/python", "/bin/true"):
        monkeypatch.setattr(sys, "executable", executable)
        answer = solve(problem)
        assert answer.milp_status.startswith("failed: the solver process did not start")
        _still_good(problem, answer)


def test_wrong_answer_of_the_solver_is_not_believed(
    make_realistic: MakeProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A solver that gives every head the dense rule breaks the budget; the answer is repaired or replaced."""
    problem = make_realistic(8, 4, 4, 0.3)
    dense = np.full((4, 4), problem.loss.shape[3] - 1)
    lie = milp.MilpAnswer("optimal", dense, -np.inf)
    monkeypatch.setattr("moa.optimize.solve.solve_milp", lambda *args, **options: lie)
    answer = solve(problem)
    check(problem, answer, Target.balanced(problem))
    assert answer.gap_ratio < 0.05


def fake_answer(status: str, columns: int, value: float | None, bound: float = -np.inf) -> Message:
    """A worker's message: every x is `value`, or there is none."""
    x = np.zeros(0) if value is None else np.full(columns, value)
    return {"status": np.array(status), "x": x, "bound": np.array(bound)}


@pytest.mark.parametrize(
    ("status", "value", "told"),
    [
        ("user_limit", None, "time_limit"),
        ("user_limit", 0.0, "time_limit"),
        ("optimal", 0.0, "failed: the answer does not give every head a rule"),
        ("optimal", None, "failed: the answer does not give every head a rule"),
        ("optimal", np.nan, "failed: the answer does not give every head a rule"),
        ("infeasible", None, "infeasible"),
        ("infeasible_or_unbounded", None, "infeasible"),
        ("unbounded", 1.0, "unbounded"),
        ("failed: SolverError: no", None, "failed: SolverError: no"),
    ],
)
def test_answers_without_a_plan_leave_the_heuristic_one_and_its_bound(
    make_realistic: MakeProblem, monkeypatch: pytest.MonkeyPatch, status: str, value: float | None, told: str
) -> None:
    def ask(self: MilpWorker, message: Message, limit_s: float) -> Message:
        return fake_answer(status, message["cost"].size, value, bound=1e9 if told.startswith("failed") else -np.inf)

    problem = make_realistic(8, 4, 4, 0.3)
    monkeypatch.setattr(MilpWorker, "ask", ask)
    answer = solve(problem)
    assert answer.milp_status == told
    _still_good(problem, answer)
    assert answer.gap_ratio > 0


def test_all_zeros_are_no_choice_of_the_first_rule(make_realistic: MakeProblem) -> None:
    keep = np.ones((2, 2, 3), dtype=bool)
    assert milp.read_answer(fake_answer("user_limit", 12, 0.0), keep).picks is None
    third = fake_answer("optimal", 12, 0.0, bound=2.0)
    third["x"] = np.tile([0.0, 0.0, 1.0], 4)
    answer = milp.read_answer(third, keep)
    assert answer.picks is not None
    assert (answer.picks.tolist(), answer.bound) == ([[2, 2], [2, 2]], 2.0)


def test_limits_that_cannot_be_kept_are_infeasible(make_tiny: MakeProblem, worker: MilpWorker) -> None:
    problem = make_tiny(9)
    least = problem.loss.min(axis=3).sum(axis=(1, 2))
    with pytest.raises(InfeasibleError, match="loosen them"):
        solve(problem, Target.at_length(problem, 0, np.array([np.inf, least[1] - abs(least[1])])), worker=worker)


@pytest.mark.parametrize("options", [{"rel_gap": -1.0}, {"rel_gap": 1.0}, {"time_limit_s": 0.0}])
def test_solve_refuses_what_cannot_be_meant(make_tiny: MakeProblem, options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        solve(make_tiny(0), **options)


def test_milp_is_left_out_where_the_relaxation_proves_enough(make_realistic: MakeProblem, worker: MilpWorker) -> None:
    problem = make_realistic(10, 16, 8, 0.3)
    answer = solve(problem, rel_gap=0.02, worker=worker, always_milp=False)
    assert (answer.milp_status, answer.status) == ("not needed", "optimal")
    assert answer.gap_ratio <= 0.02
    assert solve(problem, rel_gap=0.0, time_limit_s=0.5, worker=worker, always_milp=False).milp_status != "not needed"


def test_zero_losses_and_a_full_budget_are_fine(make_tiny: MakeProblem, worker: MilpWorker) -> None:
    problem = make_tiny(0)
    empty = replace(problem, loss=np.zeros_like(problem.loss), density_budget=(1.0, 1.0))
    answer = solve(empty, worker=worker)
    assert (answer.value, answer.gap_ratio, answer.status) == (0.0, 0.0, "optimal")


def test_worker_ends_when_its_parent_does() -> None:
    code = (
        "import os\nfrom moa.optimize.milp import MilpWorker\nimport numpy as np\n"
        "w = MilpWorker(); w.ask({'cost': np.zeros(1)}, 60.0)\nos.write(1, str(w.pid).encode())\nos._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=_environment())
    deadline = time.monotonic() + 20
    while _alive(int(done.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(int(done.stdout))


def test_worker_loads_no_model_library() -> None:
    code = "import sys, moa.optimize.model, moa.optimize.worker; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=_environment())


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
