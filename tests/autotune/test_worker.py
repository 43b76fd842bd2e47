"""Processes that die or hang."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mhc_tile.autotune.worker import Worker, WorkerDied, WorkerHung, pooled

ECHO = "fake_bench:echo"


def answers(worker: Worker, task: str, seconds: float = 30.0) -> list[str]:
    worker.send(task)
    return list(worker.messages(seconds))


def test_a_worker_is_one_process_that_answers_task_after_task(tmp_path):
    worker = Worker(ECHO, log=tmp_path / "log")
    assert [answers(worker, task) for task in "ab"] == [
        [f"{task} by {worker.pid}"] for task in "ab"
    ]
    assert worker.pid != os.getpid()
    worker.kill()
    assert (tmp_path / "log").read_text() == "a line of output\n" * 2


@pytest.mark.parametrize(
    ("does", "error", "how"),
    [
        ("dies", WorkerDied, "the process died of SIGSEGV"),
        ("exits", WorkerDied, "the process ended with code 3"),
        ("hangs", WorkerHung, "no answer for 1 s"),
    ],
)
def test_a_worker_that_fails_is_gone(does, error, how):
    worker = Worker(ECHO)
    assert answers(worker, "a")
    with pytest.raises(error, match=how):
        answers(worker, does, 1.0 if does == "hangs" else 30.0)
    assert not worker._process.is_alive()
    with pytest.raises(WorkerDied):
        worker.send("a")


def test_a_pool_answers_every_task_and_replaces_who_fails():
    tasks = ["a", "hangs", "b", "dies", "c", "d"]
    found = dict(pooled(ECHO, tasks, jobs=2, seconds=2.0))
    assert set(found) == set(tasks)
    assert isinstance(found["hangs"], WorkerHung)
    assert isinstance(found["dies"], WorkerDied)
    said = {task: found[task].split(" by ") for task in "abcd"}
    assert all(said[task][0] == task for task in said)
    assert 1 < len({pid for _, pid in said.values()}) <= 4


def test_a_pool_has_no_more_processes_than_tasks():
    (answer,) = pooled(ECHO, ["a"], jobs=8, seconds=30.0)
    assert answer[0] == "a"


def test_a_hung_worker_does_not_outlive_a_killed_tuner(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from mhc_tile.autotune.worker import Worker\n"
        "if __name__ == '__main__':\n"
        f"    worker = Worker({ECHO!r})\n"
        "    worker.send('a')\n"
        "    print(*worker.messages(60), flush=True)\n"
        "    worker.send('hangs')\n"
        "    list(worker.messages(60))\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[-1])
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists():
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return  # it has ended, and waits for its new parent to notice
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)
