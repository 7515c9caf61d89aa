"""WorkerProcess: whatever happens in the process is an answer; after a crash it is there again."""

import os

import pytest

from diffopt.bench.attention import worker_process
from diffopt.bench.attention.worker_process import Answer, WorkerProcess

_PATIENT = 60


@pytest.fixture
def worker():
    process = WorkerProcess("test", "worker_commands:factory", "hello")
    yield process
    process.close()


def test_it_answers_and_stays_alive(worker):
    assert worker.ask("greet", "you", timeout=_PATIENT) == Answer("ok", "hello, you")
    first = worker.ask("pid", timeout=_PATIENT).value
    assert first not in (None, os.getpid())
    assert worker.ask("refuse", timeout=_PATIENT) == Answer("refused", why="not with me")
    assert worker.ask("out_of_memory", timeout=_PATIENT).status == "out of memory"
    failed = worker.ask("fail", timeout=_PATIENT)
    assert (failed.status, failed.died) == ("failed", False)
    assert "ZeroDivisionError" in failed.why
    assert worker.ask("pid", timeout=_PATIENT).value == first


def test_a_crash_is_an_answer_with_its_last_words_and_the_next_question_finds_a_new_process(worker):
    first = worker.ask("pid", timeout=_PATIENT).value
    answer = worker.ask("crash", timeout=_PATIENT)
    assert (answer.status, answer.died) == ("failed", True)
    assert answer.why == "the process ended with 7: last words"
    second = worker.ask("pid", timeout=_PATIENT).value
    assert second not in (None, first)


def test_a_process_that_is_no_longer_sound_is_replaced(worker):
    first = worker.ask("pid", timeout=_PATIENT).value
    answer = worker.ask("poison", timeout=_PATIENT)
    assert answer.died
    assert "illegal memory access" in answer.why
    assert worker.ask("pid", timeout=_PATIENT).value != first


def test_a_process_that_hangs_is_ended(worker):
    pid = worker.ask("pid", timeout=_PATIENT).value
    answer = worker.ask("hang", timeout=0.2)
    assert (answer.status, answer.died) == ("failed", True)
    assert "no answer within" in answer.why
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_after_too_many_starts_it_is_given_up(worker, monkeypatch):
    monkeypatch.setattr(worker_process, "_STARTS", 2)
    assert [worker.ask("crash", timeout=_PATIENT).why.split(":")[0] for _ in range(3)] == [
        "the process ended with 7",
        "the process ended with 7",
        "given up after 2 starts",
    ]


def test_a_process_that_can_not_start_says_why(monkeypatch):
    monkeypatch.setattr(worker_process, "_STARTS", 1)
    process = WorkerProcess("test", "worker_commands:broken_factory")
    try:
        answer = process.ask("anything", timeout=_PATIENT)
        assert answer.died
        assert "no GPU today" in answer.why
    finally:
        process.close()


def test_closing_ends_the_process_for_good(worker):
    pid = worker.ask("pid", timeout=_PATIENT).value
    worker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert worker.ask("pid", timeout=_PATIENT).status == "failed"
