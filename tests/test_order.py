import collections

import numpy as np
import pytest

from clip_jax.errors import UserError
from clip_jax.order import Order


def stream(order: Order, batch: int, batches: int, position: int = 0) -> list[list[int]]:
    """The examples of some batches."""
    starts = [order.start(order.after(position, batch, number), batch) for number in range(batches)]
    return [[order.example(start + row) for row in range(batch)] for start in starts]


def test_a_pass_shows_every_example_once_in_an_order_of_its_own():
    order = Order([7, 5], (), seed=0)
    passes = [sum(stream(order, 4, 3, position), []) for position in (0, 12, 24)]
    assert all(sorted(shown) == list(range(12)) for shown in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]
    assert stream(Order([7, 5], (), seed=1), 4, 3) != stream(order, 4, 3)


def test_what_is_left_of_a_pass_is_passed_over_so_that_no_batch_repeats_itself():
    for batch in stream(Order([10], (), seed=0), 4, 20):
        assert len(set(batch)) == 4


@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
@pytest.mark.parametrize("taken", [0, 1, 2, 3, 7])
def test_a_position_is_all_that_going_on_needs(weights, taken):
    order = Order([7, 6], weights, seed=0)
    whole = stream(order, 5, 12)
    assert stream(order, 5, 12 - taken, order.after(0, 5, taken)) == whole[taken:]


def test_another_batch_size_goes_on_at_the_same_place():
    order = Order([12], (), seed=0)
    before, after = stream(order, 4, 1), stream(order, 2, 4, order.after(0, 4, 1))
    assert sorted(sum(before + after, [])) == list(range(12))


def test_a_mixture_draws_by_weight_and_each_set_has_whole_passes():
    order = Order([100, 10], (0.75, 0.25), seed=0)
    shown = sum(stream(order, 8, 100), [])
    assert sum(example < 100 for example in shown) == 600
    first = [example for example in shown if example < 100][:300]
    assert all(count == 3 for count in collections.Counter(first).values()) and len(set(first)) == 100
    for batch in stream(order, 8, 20):
        assert sum(example >= 100 for example in batch) == 2  # evenly spread


def test_weights_that_mean_nothing_are_refused():
    for weights in ((1.0,), (1.0, 0.0), (1.0, -1.0)):
        with pytest.raises(UserError, match="expected a number above zero for each of the 2"):
            Order([5, 5], weights, seed=0)
    with pytest.raises(UserError, match="at least 0.0001 of the sum"):
        Order([5, 5], (1.0, 1e-6), seed=0)


def test_a_place_far_away_costs_what_a_near_one_does():
    order = Order([10_000_000_000], (), seed=0)
    places = [0, 1, 9_999_999_999, 123_456_789_012]
    found = [order.example(place) for place in places]
    assert len(set(found)) == 4 and all(0 <= example < 10**10 for example in found)
    assert order.after(0, 1000, 10**12) == 10**15


def test_the_order_is_random():
    first = [Order([1000], (), seed=seed).example(0) for seed in range(300)]
    assert len(set(first)) > 230  # of 300 draws from 1,000, 259 differ on average
    shown = np.array([Order([1000], (), seed=0).example(place) for place in range(1000)])
    assert abs(np.corrcoef(shown, np.arange(1000))[0, 1]) < 0.12
    assert (np.abs(np.diff(shown)) == 1).mean() < 0.02
