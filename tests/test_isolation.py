"""Tasks in processes of their own: whatever happens to one, the others and the parent go on."""

import os
import time

import pytest

from diffopt.attention.isolation import Failure, run_many, run_one

PATIENCE = 60.0


def double(send, number):
    send("before")
    print("noise of a library")
    return 2 * number


def abort(send):
    os.write(2, b"terminate called\nan illegal memory access\n")
    os.abort()


def refuse(send):
    raise ValueError("not\nhere")


def sleep(send):
    time.sleep(60)


def pick(send, number):
    if number == 2:
        os._exit(3)
    return number


def test_a_task_sends_messages_and_returns(capfd):
    messages = []
    assert run_one(double, 21, silence=PATIENCE, on_message=messages.append) == 42
    assert messages == ["before"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("task", "words"),
    [(abort, "its process ended with -6: an illegal memory access"), (refuse, "ValueError: not here")],
)
def test_a_task_that_fails_says_how(task, words):
    assert run_one(task, silence=PATIENCE) == Failure(words)


def test_a_task_that_says_nothing_is_ended():
    run_one(double, 1, silence=PATIENCE)  # the server has started
    start = time.monotonic()
    assert run_one(sleep, silence=0.2) == Failure("no result within 0 s")
    assert time.monotonic() - start < 30


def test_one_death_among_many_costs_only_its_own_result():
    outcomes = dict(run_many(pick, [(number,) for number in range(5)], workers=2, silence=PATIENCE))
    assert outcomes == {(0,): 0, (1,): 1, (2,): Failure("its process ended with 3"), (3,): 3, (4,): 4}


def test_leaving_early_ends_what_still_runs():
    running = run_many(sleep, [()] * 3, workers=3, silence=0.1)
    assert next(running)[1] == Failure("no result within 0 s")
    start = time.monotonic()
    running.close()
    assert time.monotonic() - start < 30
