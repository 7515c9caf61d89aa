"""A process for the tests of WorkerProcess: commands that answer, refuse, raise, crash and hang. Imports no torch."""

import os
import time

from diffopt.bench.attention.worker_process import RefusedError


class OutOfMemoryError(Exception):
    """Named like torch's."""


def factory(greeting):
    sound = [True]

    def refuse():
        raise RefusedError("not with me")

    def out_of_memory():
        raise OutOfMemoryError("too large")

    def crash():
        print("last words", flush=True)
        os._exit(7)

    def poison():
        sound[0] = False
        raise RuntimeError("illegal memory access")

    commands = {
        "greet": lambda name: f"{greeting}, {name}",
        "pid": os.getpid,
        "refuse": refuse,
        "out_of_memory": out_of_memory,
        "fail": lambda: 1 // 0,
        "crash": crash,
        "poison": poison,
        "hang": lambda: time.sleep(600),
    }
    return commands, lambda: sound[0]


def broken_factory():
    raise RuntimeError("no GPU today")
