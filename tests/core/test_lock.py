"""One run at a time in a folder; a dead one locks nobody out."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from dataflex.core import lock
from dataflex.core.lock import any_record, check_still_there, refuse_if_locked, run_lock
from dataflex.errors import TrainingError

HOLDER = "import sys, time; from dataflex.core.lock import run_lock\nwith run_lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_told_by_whom(tmp_path, holder):
    for attempt in (run_lock(tmp_path / "out"), run_lock(f"{tmp_path}/./out/")):
        with pytest.raises(TrainingError, match=rf"is in use by another run, process {holder.pid} on {socket.gethostname()} since \d{{4}}-"), attempt:
            pass
    with pytest.raises(TrainingError, match="is in use"):
        refuse_if_locked(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["dataflex", "lock"]


def test_a_killed_run_locks_nobody_out(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "out" / "dataflex" / "lock").exists() and not any_record(tmp_path / "out")
    begun = time.monotonic()
    with run_lock(tmp_path / "out"):
        assert json.loads((tmp_path / "out" / "dataflex" / "lock").read_text())["pid"] == os.getpid()
    assert time.monotonic() - begun < 2


def test_nothing_is_left_behind(tmp_path):
    with run_lock(tmp_path / "out"), run_lock(tmp_path / "out"):  # `train` within a command
        assert (tmp_path / "out" / "dataflex" / "lock").exists()
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with run_lock(tmp_path / "mine"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []
    with run_lock(tmp_path / "other", active=False):  # rank 1
        assert not (tmp_path / "other").exists()


def test_a_loader_worker_that_outlives_its_run_does_not_keep_the_lock(tmp_path):
    ready, told = os.pipe()
    with run_lock(tmp_path / "out"):
        worker = os.fork()
        if worker == 0:
            os.write(told, b"x")
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
        handle = os.open(tmp_path / "out" / "dataflex" / "lock", os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def of_another_machine(folder):
    path = folder / "dataflex" / "lock"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"host": "node7", "pid": 11, "since": "2026-01-02 03:04:05"}))
    return path


def test_a_record_of_another_machine_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.1)
    monkeypatch.setattr(lock, "_PATIENCE", 0.5)
    path = of_another_machine(tmp_path / "out")
    beats = threading.Timer(0.2, lambda: os.utime(path))
    beats.start()
    with pytest.raises(TrainingError, match="process 11 on node7 since 2026-01-02 03:04:05"), run_lock(tmp_path / "out"):
        pass
    beats.join()
    with run_lock(tmp_path / "out"):  # nothing touches it any more
        pass


def test_a_living_run_touches_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    with run_lock(tmp_path / "out"):
        path = tmp_path / "out" / "dataflex" / "lock"
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert path.stat().st_mtime > 0


@pytest.mark.parametrize("alive", [True, False])
def test_where_the_file_system_has_no_locks_the_record_decides(tmp_path, monkeypatch, alive):
    def none(*arguments):
        raise OSError("no locks")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    path = of_another_machine(tmp_path / "out")
    pid = os.getppid() if alive else 2**22 + 1
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": pid, "since": "now"}))
    if alive:
        with pytest.raises(TrainingError, match=f"process {pid}"), run_lock(tmp_path / "out"):
            pass
    else:
        with run_lock(tmp_path / "out"):
            pass


def test_a_folder_that_is_gone_is_noticed(tmp_path):
    with run_lock(tmp_path / "out"):
        check_still_there(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / "moved")
        with pytest.raises(TrainingError, match="was removed or replaced"):
            check_still_there(tmp_path / "out")
        (tmp_path / "out" / "dataflex").mkdir(parents=True)
        (tmp_path / "out" / "dataflex" / "lock").touch()  # of another run
        with pytest.raises(TrainingError, match="was removed or replaced"):
            check_still_there(tmp_path / "out")
    assert (tmp_path / "out" / "dataflex" / "lock").exists()  # not ours to delete


def test_a_folder_that_cannot_be_written_is_no_traceback(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match="cannot be written"), run_lock(tmp_path / "file" / "out"):
        pass


def test_what_a_killed_run_left_half_written_is_deleted(tmp_path):
    folder = tmp_path / "out" / "dataflex" / "selections"
    folder.mkdir(parents=True)
    (folder / ".step_3.npy.123-0123abcd.tmp").touch()
    (folder / ".mine.tmp").touch()
    with run_lock(tmp_path / "out"):
        assert [path.name for path in folder.iterdir()] == [".mine.tmp"]


def test_a_folder_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with run_lock("~/out"), run_lock(tmp_path / "out"):
        assert (tmp_path / "out" / "dataflex" / "lock").exists()
    assert not (tmp_path / "~").exists()
