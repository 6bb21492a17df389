"""Writing files: devices, pipes and links stay what they are; locks without the kernel's; streams; caches."""

import errno
import json
import os
import runpy
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import shard_tools.system.library_caches as library_caches
import shard_tools.system.locks as locks
from shard_tools.atomic_files import whole_file, write_whole
from shard_tools.errors import InputError
from tests.conftest import MakeData

ROOT = Path(__file__).resolve().parents[1]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "scores.csv", tmp_path / "link.csv"
    link.symlink_to("elsewhere/scores.csv")
    for text in ("made anew", "replaced"):
        write_whole(link, text)
        assert link.is_symlink() and target.read_text() == text and not target.is_symlink()
    assert names_in(target.parent) == ["scores.csv"]


def test_a_pipe_gets_the_bytes_and_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"id,target\n" * 1000)
    found = os.read(reader, 1 << 20)
    os.close(reader)
    assert found == b"id,target\n" * 1000 and pipe.is_fifo()
    assert names_in(tmp_path) == ["pipe"]


def test_a_device_stays_a_device(tmp_path: Path) -> None:
    """Tried on a device node that the test makes, which takes root: never on the machine's /dev/null."""
    node = tmp_path / "null"
    try:
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        node.write_bytes(b"")
    except PermissionError:
        pytest.skip("only root can make a device, and not in every container")
    write_whole(node, "gone")
    assert node.is_char_device() and names_in(tmp_path) == ["null"]


def test_our_own_standard_output_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """Tried on a link of our own like /dev/stdout, since faulty code would replace the machine's."""
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    script = "import pathlib, sys, shard_tools.atomic_files as f; print('before', flush=True); "
    script += "f.write_whole(pathlib.Path(sys.argv[1]), 'scores\\n'); print('after')"
    words = [sys.executable, "-c", script, tmp_path / "stdout"]
    with (tmp_path / "out").open("wb") as out:
        subprocess.run(words, cwd=ROOT, stdout=out, check=True)
        assert os.fstat(out.fileno()).st_nlink == 1
    assert (tmp_path / "out").read_text() == "before\nscores\nafter\n"
    assert (tmp_path / "stdout").is_symlink() and names_in(tmp_path) == ["out", "stdout"]


# A process that holds the lock of a folder until it is killed. It has no flock, like NFS without a lock daemon.
HOLDER = """
import errno, fcntl, os, pathlib, sys, time
def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = flock
from shard_tools.system.locks import folder_lock
with folder_lock(pathlib.Path(sys.argv[1]), ".lock"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def take(folder: Path) -> None:
    with locks.folder_lock(folder, ".lock"):
        pass


def test_without_kernel_locks_a_living_owner_keeps_others_out_and_a_killed_one_does_not(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    """It keeps out others that have kernel locks too: one machine's mount may support them and another's may not."""
    second = subprocess.run(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, input="", capture_output=True, text=True, check=False
    )
    assert second.returncode and "another process is writing here" in second.stderr
    with pytest.raises(InputError, match="another process is writing here"):
        take(tmp_path)
    holder.send_signal(signal.SIGKILL)
    # The lock is free at once, even before the parent has waited for the killed process.
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    take(tmp_path)
    assert names_in(tmp_path) == [".lock"]


def test_an_owner_that_ends_leaves_no_lock(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.communicate("")
    assert names_in(tmp_path) == [".lock"]


@pytest.mark.parametrize("is_alive", [True, False])
def test_an_owner_on_another_machine_counts_as_dead_without_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_alive: bool
) -> None:
    owner = tmp_path / ".lock.owner"
    about = {"machine": f"not {socket.gethostname()}", "process": os.getpid(), "started": "1", "beat": "0"}
    owner.write_text(json.dumps(about))
    monkeypatch.setattr(locks, "SILENT_SECONDS", 1.0 if is_alive else 0.1)
    if is_alive:
        beat = threading.Timer(0.05, lambda: owner.write_text(json.dumps({**about, "beat": "1"})))
        beat.start()
        with pytest.raises(InputError, match="another process is writing here"):
            take(tmp_path)
        beat.join()
    else:
        take(tmp_path)
    assert owner.exists() == is_alive


def test_an_owner_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.01)
    owner = tmp_path / "owner"
    with locks._own(owner):
        first = owner.read_bytes()
        while owner.read_bytes() in (first, b""):
            pass
        assert locks.is_ours(owner.read_bytes())
    assert not owner.exists()


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&- <&-"])
def test_a_command_without_standard_streams_does_its_work(make_data: MakeData, tmp_path: Path, closed: str) -> None:
    data = make_data()
    words = f"{sys.executable} -m shard_tools pack --input {data.root} --out {tmp_path / 'out'} --folds 3 {closed}"
    done = subprocess.run(["sh", "-c", words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "manifest.json" in [path.name for path in (tmp_path / "out").iterdir()]
    checked = subprocess.run([sys.executable, "-m", "shard_tools", "verify", tmp_path / "out"], cwd=ROOT, check=False)
    assert checked.returncode == 0, "something that was printed went into a file that got the number of a stream"


def test_a_name_that_the_terminal_lacks_is_printed_with_backslashes(make_data: MakeData, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "shard_tools", "pack", "--input", make_data().root, "--out", tmp_path / "天文"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*words, "--folds", "3"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "\\u5929\\u6587" in done.stdout and "Traceback" not in done.stderr


def test_output_that_cannot_be_written_is_an_error_and_no_traceback(make_data: MakeData, tmp_path: Path) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("needs /dev/full")
    words = [sys.executable, "-m", "shard_tools", "pack", "--input", make_data().root, "--out", tmp_path / "out"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*words, "--folds", "3"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1 and "standard output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


HOMELESS = """
import os, sys
import pipeline.cpu_kernels, training.search.dedoppler_kernels, reports.plots
print(os.environ["NUMBA_CACHE_DIR"], os.environ["MPLCONFIGDIR"])
"""


def test_without_a_home_that_can_be_written_caches_are_temporary(tmp_path: Path) -> None:
    """The code's folders cannot be written either: files take the place of Numba's folders, which stops root too."""
    code, temporary = tmp_path / "code", tmp_path / "tmp"
    temporary.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("shard_tools", "pipeline", "training", "reports"):
        shutil.copytree(ROOT / name, code / name, ignore=ignored)
        (code / name / "__pycache__").touch()
    words = [sys.executable, "-B", "-c", HOMELESS]
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(temporary), "HOME": os.devnull}
    done = subprocess.run(words, cwd=code, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    numba, matplotlib = map(Path, done.stdout.split())
    assert numba.is_relative_to(temporary) and matplotlib.is_relative_to(temporary)
    assert stat.S_IMODE(numba.parent.stat().st_mode) == 0o700 and os.devnull not in done.stderr


@pytest.fixture
def nameless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a user without name and HOME, whose `~` is not expanded; yields the temporary folder."""
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "NUMBA_CACHE_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone at the end
        monkeypatch.delenv(name)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(library_caches, "_ROOT", Path(os.devnull, "code"))
    monkeypatch.setattr(library_caches.tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_home_at_all_caches_are_temporary_too(nameless: Path) -> None:
    library_caches.place_library_caches()
    own = nameless / f"needlestream-caches-{os.getuid()}"
    assert (os.environ["NUMBA_CACHE_DIR"], os.environ["MPLCONFIGDIR"]) == (f"{own}/numba", f"{own}/matplotlib")
    assert names_in(nameless) == [own.name]


def test_a_cache_that_others_can_write_is_not_used_since_numba_runs_what_lies_there(nameless: Path) -> None:
    planted = nameless / f"needlestream-caches-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    library_caches.place_library_caches()
    assert not Path(os.environ["NUMBA_CACHE_DIR"]).is_relative_to(planted)


def test_places_for_caches_that_the_user_set_stay(nameless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "mine")
    monkeypatch.setenv("MPLCONFIGDIR", "mine too")
    library_caches.place_library_caches()
    assert (os.environ["NUMBA_CACHE_DIR"], os.environ["MPLCONFIGDIR"]) == ("mine", "mine too")
    assert names_in(nameless) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device", "checkpoint")])
@pytest.mark.parametrize(
    ("script", "advice"),
    [("train.py", "run the same command with --resume"), ("infer.py", "run the same command again")],
)
def test_a_command_that_was_cut_short_says_how_that_command_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, advice: str, error: BaseException
) -> None:
    def end(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("tyro.cli", end)
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert advice in capsys.readouterr().err


def test_writers_on_two_machines_whose_processes_have_the_same_number_keep_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with whole_file(tmp_path / "part.parquet") as first, whole_file(tmp_path / "part.parquet") as second:
        assert first != second
        first.write_text("whole")
        second.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["part.parquet"]
