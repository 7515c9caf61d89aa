"""The environment of a measurement, and peak memory."""

import mmap
import shutil
import subprocess

import pytest
import torch

from diffopt.measure import environment as module
from diffopt.measure.environment import Machine, clocks, environment, process_memory
from diffopt.measure.memory import peak_memory


@pytest.fixture(autouse=True)
def _fresh_software():
    module._software.cache_clear()
    yield
    module._software.cache_clear()


def test_a_cpu_environment_names_machine_and_versions():
    here = environment("cpu")
    assert here.machine.gpu is None
    assert here.machine.cpu
    assert here.machine.cpu in here.machine.name
    assert here.machine.threads == torch.get_num_threads()
    assert here.software.packages["torch"] == torch.__version__
    assert here.software.packages["diffopt"]
    assert here.time_utc.endswith("+00:00")
    assert clocks("cpu") is None
    assert process_memory("cpu") is None


def test_the_gpus_name_is_the_machines():
    machine = Machine("NVIDIA X", None, None, None, None, None, None, "some CPU", 1, 1, 1, "Linux")
    assert machine.name == "NVIDIA X"


def test_no_git_means_no_commit_and_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    software = environment("cpu").software
    assert (software.commit, software.dirty) == (None, None)
    assert len(software.source_hash) == 64


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_and_dirty_flag_of_a_checkout(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    commit, dirty = module._commit(tmp_path.resolve())
    assert commit is not None
    assert (len(commit), dirty) == (40, False)
    (tmp_path / "file").write_text("two")
    assert module._commit(tmp_path.resolve()) == (commit, True)
    inside = tmp_path / "site-packages"  # an install inside somebody's checkout isn't that checkout
    inside.mkdir()
    assert module._commit(inside.resolve()) == (None, None)


def test_the_source_hash_follows_the_code(tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    before = module._source_hash(tmp_path)
    assert module._source_hash(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2")
    assert module._source_hash(tmp_path) != before


def test_peak_memory_sees_a_buffer_that_is_gone_by_the_end():
    def small():
        torch.ones(1)

    def large():  # 256 MiB, freed at once; not by malloc, which may have as much at hand that is resident already
        with mmap.mmap(-1, 256 * 2**20) as fresh:
            fresh.write(bytes(len(fresh)))

    quiet, busy = peak_memory(small, "cpu"), peak_memory(large, "cpu")
    if quiet.process is None or busy.process is None:
        pytest.skip("this system doesn't let a process reset its peak memory")
    assert busy.process - quiet.process > 200 * 2**20
    assert busy.headline == busy.process


@pytest.mark.gpu
def test_a_gpu_environment_and_its_memory():
    here = environment("cuda")
    assert here.machine.gpu == torch.cuda.get_device_name()
    assert here.machine.name == here.machine.gpu
    memory = peak_memory(lambda: torch.ones(64, 1024, 1024, device="cuda"), "cuda")
    assert memory.allocated is not None
    assert memory.reserved is not None
    assert memory.device_used is not None
    assert 256 * 2**20 <= memory.allocated <= memory.reserved <= memory.device_used
