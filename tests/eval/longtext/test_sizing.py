from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moa.eval.longtext.sizing import most_units


@given(
    st.integers(1, 9),
    st.integers(0, 50),
    st.integers(0, 3000),
    st.integers(1, 40),
    st.integers(0, 500),
    st.none() | st.integers(1, 300),
)
def test_no_fitting_number_is_larger(per_unit, fixed, limit, least, guess, supply):
    def size(units):
        return None if supply is not None and units > supply else fixed + per_unit * units

    found = most_units(size, limit, least, guess)
    best = (limit - fixed) // per_unit if supply is None else min((limit - fixed) // per_unit, supply)
    assert found == (best if best >= least else None)


def test_a_good_guess_saves_calls():
    asked = []
    assert most_units(lambda n: asked.append(n) or n, 10_000, 1, 9_999) == 10_000
    assert len(asked) <= 4


@given(st.lists(st.integers(-2, 5), min_size=1, max_size=60), st.integers(1, 60))
def test_what_is_found_fits_where_sizes_go_up_and_down(steps, guess):
    sizes = [sum(steps[:i]) for i in range(len(steps) + 1)]
    found = most_units(lambda n: sizes[n] if n < len(sizes) else None, 20, 1, guess)
    assert found is None or sizes[found] <= 20
