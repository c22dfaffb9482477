import threading

import pytest

from auto_round.background import Background


def fail(message):
    raise OSError(message)


def test_work_runs_beside_and_its_result_is_given_once():
    started, go_on = threading.Event(), threading.Event()

    def work(value):
        started.set()
        assert go_on.wait(10)
        return value + 1

    with Background() as background:
        assert background.result() is None
        background.begin(work, 1)
        assert started.wait(10)
        go_on.set()
        assert background.result() == 2
        assert background.result() is None


def test_what_is_given_next_waits_for_what_is_being_done():
    done = []
    with Background() as background:
        for number in range(20):
            background.begin(done.append, number)
    assert done == list(range(20))


def test_an_error_is_raised_where_the_next_thing_is_given():
    with Background() as background:
        background.begin(fail, "disk full")
        with pytest.raises(OSError, match="disk full"):
            background.begin(print)


def test_an_error_is_raised_at_the_end():
    with pytest.raises(OSError, match="disk full"), Background() as background:
        background.begin(fail, "disk full")


def test_an_error_of_the_run_is_not_replaced_by_one_of_the_thread(caplog):
    background = Background()
    background.begin(fail, "disk full")
    with pytest.raises(ValueError, match="first"), background:
        raise ValueError("first")
    assert "disk full" in caplog.text


def test_work_is_finished_when_the_run_fails():
    done, go_on = [], threading.Event()

    def work():
        assert go_on.wait(10)
        done.append(1)

    background = Background()
    background.begin(work)
    go_on.set()
    with pytest.raises(ValueError, match="run"), background:
        raise ValueError("run")
    assert done == [1]
