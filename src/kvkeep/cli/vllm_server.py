"""A real ``vllm serve`` as a child process: started, waited for, and ended by its id whatever happens."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

READY_SECONDS = 600.0
STOP_SECONDS = 60.0

ENVIRONMENT = {
    # One core for the worker, the others for all else. A connector makes vLLM reserve one more core where it chooses
    # itself, so servers with and without kvkeep would not be alike.
    "VLLM_CPU_OMP_THREADS_BIND": str(max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0),
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


class ServerError(Exception):
    """The server did not start, or has ended by itself; the message holds the end of its log."""


def command() -> Path:
    """The ``vllm`` of this interpreter's environment. Raises :class:`ServerError` where there is none."""
    path = Path(sys.executable).with_name("vllm")
    if not path.exists():
        raise ServerError(f"there is no vLLM beside {sys.executable}: run this by `make demo-vllm`, or install vLLM")
    return path


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Server:
    """``with Server(model, flags, log=path) as server``: it answers at ``server.url`` until the block ends.

    It leads a process group of its own: a Ctrl-C in the terminal reaches it through this class alone, and what it has
    started ends with it.
    """

    def __init__(
        self,
        model: str,
        flags: Sequence[str] = (),
        *,
        log: Path,
        environment: Mapping[str, str] = {},
        waiting: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._waiting = waiting
        self._arguments = [str(command()), "serve", model, "--host", "127.0.0.1", "--port", str(self.port), *flags]
        self._environment = {**os.environ, **ENVIRONMENT, **environment}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._arguments,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(self.process)
        except BaseException:  # Ctrl-C too: nothing may be left running
            self.stop(patience=5)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        begin = time.monotonic()
        while True:
            seconds = time.monotonic() - begin
            if process.poll() is not None:
                raise ServerError(f"vllm serve ended with status {process.returncode}:\n{self.end_of_log()}")
            if seconds > READY_SECONDS:
                raise ServerError(f"vllm serve was not ready after {READY_SECONDS:.0f} s:\n{self.end_of_log()}")
            self._waiting(seconds)
            with (
                suppress(urllib.error.URLError, ConnectionError, TimeoutError),
                urllib.request.urlopen(f"{self.url}/health", timeout=5),
            ):
                return
            time.sleep(0.3)

    def end_of_log(self, lines: int = 15) -> str:
        with suppress(OSError):
            return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        return ""

    def stop(self, patience: float = STOP_SECONDS) -> None:
        """Ask it to end, wait, then end what is left of its group."""
        process, self.process = self.process, None
        if process is None:
            return
        try:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
            # Its workers may still be writing what they hold.
            deadline = time.monotonic() + patience
            while _lives(process.pid) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:  # a second Ctrl-C while waiting, too
            self._signal(process.pid, signal.SIGKILL)
            process.wait()

    def kill(self) -> None:
        """As a crash would: all of it at once, with nothing written any more."""
        process, self.process = self.process, None
        if process is not None:
            self._signal(process.pid, signal.SIGKILL)
            process.wait()

    @staticmethod
    def _signal(group: int, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)


def _lives(group: int) -> bool:
    """Does any process of the group run? One that has ended and that nobody has waited for does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False
