import contextlib

import pytest
import torch

from auto_round.tuning.feed import Feed, FeedAhead, InOrder, feed_of

CPU = torch.device("cpu")
INPUTS, TARGETS = torch.randn(10, 3, 4), torch.randn(10, 3, 4).bfloat16()
ORDER = [torch.tensor(samples) for samples in ([3, 1, 9], [0, 3, 2], [5, 4, 8], [7, 6], [1, 1, 1], [9, 0, 4])]


def assert_is_batch(found, samples):
    assert torch.equal(found[0], INPUTS[samples])
    assert torch.equal(found[1], TARGETS[samples])
    assert found[1].dtype == torch.bfloat16


def test_batches_on_the_device_are_indexed():
    feed = feed_of((INPUTS, TARGETS), CPU, ORDER)
    assert type(feed) is Feed
    for samples in [*ORDER, *ORDER[:2]]:
        assert_is_batch(feed.take(samples), samples)
    feed.close()


def test_activations_elsewhere_are_fed_ahead():
    assert type(feed_of((INPUTS, TARGETS), torch.device("meta"), ORDER)) is FeedAhead


def test_batches_that_are_sent_ahead_are_those_that_indexing_gives():
    feed = FeedAhead((INPUTS, TARGETS), CPU, ORDER)
    for samples in ORDER:
        assert_is_batch(feed.take(samples), samples)
    assert_is_batch(feed.take(ORDER[0]), ORDER[0])  # behind the end of the order


def test_a_batch_stays_while_the_next_one_is_being_copied():
    """Copies here are over when `take` returns, so one into the batch in use would be seen."""
    feed = FeedAhead((INPUTS, TARGETS), CPU, ORDER)
    first = feed.take(ORDER[0])
    assert_is_batch(first, ORDER[0])
    second = feed.take(ORDER[1])
    assert_is_batch(second, ORDER[1])
    assert {first[0].data_ptr(), second[0].data_ptr()} == {buffers[0].data_ptr() for buffers in feed._buffers}


def test_two_sets_of_buffers_serve_all_batches():
    feed = FeedAhead((INPUTS, TARGETS), CPU, ORDER)
    places = {feed.take(samples)[0].data_ptr() for samples in ORDER}
    assert len(places) == 2


def test_a_batch_out_of_order_changes_nothing():
    feed = FeedAhead((INPUTS, TARGETS), CPU, ORDER)
    other = torch.tensor([8, 2])
    first = feed.take(ORDER[0])
    assert_is_batch(feed.take(other), other)
    assert_is_batch(first, ORDER[0])
    assert_is_batch(feed.take(ORDER[1]), ORDER[1])


class RecordedLane(InOrder):
    """Notes when copies begin and end and when the device is made to wait for them."""

    def __init__(self):
        self.events = []

    @contextlib.contextmanager
    def begin(self):
        self.events.append("begin")
        yield
        self.events.append("end")

    def finish(self):
        self.events.append("finish")


def test_the_device_waits_for_a_batch_before_it_is_given_and_the_next_copy_begins_behind_that():
    lane = RecordedLane()
    feed = FeedAhead((INPUTS, TARGETS), CPU, ORDER[:2], lane)
    assert lane.events == ["begin", "end"]
    feed.take(ORDER[0])
    assert lane.events == ["begin", "end", "finish", "begin", "end"]
    feed.take(ORDER[1])
    assert lane.events[5:] == ["finish"]
    feed.close()
    assert lane.events[6:] == ["finish"]
    assert feed._buffers == [(), ()]


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_after_closing_batches_are_indexed(taken):
    feed = FeedAhead((INPUTS, TARGETS), CPU, ORDER)
    for samples in ORDER[:taken]:
        feed.take(samples)
    feed.close()
    for samples in ORDER:
        assert_is_batch(feed.take(samples), samples)
