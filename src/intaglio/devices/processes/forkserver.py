"""Fork server: a process that has imported what a child needs, and forks one in milliseconds instead of starting it.

The server has one thread and opens no device, so it can be forked safely: it refuses to fork if a module that it
imported has started a thread. It ends when its parent does, and kills the children that are left then.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from intaglio.devices.processes.kept import close_all
from intaglio.devices.recipe import named

START = "from intaglio.devices.processes.forkserver import main; main()"
MOST_FILES = 200  # descriptors in one message; Linux takes 253
BUFFER = 65536  # bytes of a message; what may be longer is in a file whose descriptor is sent
TIMEOUT = 5.0  # seconds for an answer, which takes milliseconds
IMPORT_TIMEOUT = 120.0  # seconds for imports
END_TIMEOUT = 1.0  # seconds in which it ends by itself


class ForkServerError(OSError):
    """Raised if the fork server has ended, does not answer, cannot fork, or does not know how a child ended."""


def child_environment() -> dict[str, str]:
    """Return the environment variables for a Python child process that imports this same package, as a dict."""
    source = str(Path(__file__).parents[3])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


class ForkedProcess:
    """A child process that the fork server has started.

    `returncode` is its exit status; -n if signal n killed it. It is None before wait(), or if the status cannot be
    learned.
    """

    def __init__(self, server: ForkServer, pid: int, file: int) -> None:
        self.server, self.pid, self.file = server, pid, file
        self.returncode: int | None = None

    def kill(self) -> None:
        """Send SIGKILL to the process, unless wait() has seen its end. Returns None."""
        if self.file >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.file, signal.SIGKILL)

    def wait(self) -> int | None:
        """Wait until the process has ended. Returns its exit status, or -n if signal n killed it.

        Only the fork server can learn the status. Returns None if the server has ended.
        """
        if self.file >= 0:
            select.select([self.file], [], [])
            with suppress(ForkServerError):
                self.returncode = os.waitstatus_to_exitcode(self.server.status(self.pid))
            os.close(self.file)
            self.file = -1
            self.server.children.discard(self)
        return self.returncode


ChildProcess = ForkedProcess | subprocess.Popen[bytes]


class ForkServer:
    """Client of a fork server, a process that starts child processes. fork() asks the server for a child.

    The server process starts at the first fork(). Any thread may use this object.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket | None = None
        self.stop: Callable[[], object] = int
        self.children = set[ForkedProcess]()  # of this server and earlier ones; nobody has waited for them yet

    def fork(self, target: str, argument: str, files: Sequence[int], modules: Iterable[str] = ()) -> ForkedProcess:
        """Fork a child that calls target(argument, descriptors) and then ends. Returns its ForkedProcess.

        The child has this process's environment variables and working directory, and is in a new session. If the server
        has ended or does not answer, a new server is started.

        Args:
            target: the function that the child calls, as "module:function".
            argument: the function's first argument.
            files: file descriptors that are copied to the child. The numbers of the copies are the function's second
                argument.
            modules: names of modules that the server imports before it forks.

        Raises:
            ForkServerError: the server cannot fork.
        """
        given = {"target": target, "argument": argument, "env": child_environment()}
        with suppress(OSError):
            given["folder"] = os.getcwd()
        request = os.memfd_create("intaglio-fork")
        try:
            with os.fdopen(os.dup(request), "wb") as f:
                f.write(json.dumps(given).encode())
            with self.lock:
                try:
                    answer, found = self._fork([request, *files], sorted(set(modules)))
                except ForkServerError:
                    answer, found = self._fork([request, *files], sorted(set(modules)))
        finally:
            os.close(request)
        if "error" in answer:
            raise ForkServerError(f"the fork server cannot fork: {answer['error']}")
        child = ForkedProcess(self, answer["pid"], found[0])
        self.children.add(child)
        return child

    def status(self, pid: int) -> int:
        """Return the wait status of the ended child `pid`, as os.waitpid() returns it. Does not wait.

        Raises ForkServerError if the child still runs, if its status was already asked for, or if the server has ended.
        """
        with self.lock:
            answer, _ = self._ask({"status": pid}, (), TIMEOUT)
        if "error" in answer:
            raise ForkServerError(f"the fork server does not know how process {pid} ended: {answer['error']}")
        return int(answer["status"])

    def close(self) -> None:
        """End the server and kill its children that still run. Returns None. A later fork() starts a new server."""
        self._end()
        for child in list(self.children):  # a server that hangs is killed, and does not kill its children itself
            child.kill()

    def _end(self) -> None:
        self.stop()
        self.socket = self.process = None

    def _fork(self, files: Sequence[int], modules: Sequence[str]) -> tuple[dict[str, Any], list[int]]:
        if self.socket is None:
            self._start()
        self._ask({"import": modules}, (), IMPORT_TIMEOUT)
        return self._ask({"files": len(files)}, files, TIMEOUT)

    def _ask(self, request: object, files: Sequence[int], timeout: float) -> tuple[dict[str, Any], list[int]]:
        """Send a request to the server and wait for its answer. Returns a tuple (answer, list of file descriptors).

        The answer is a dict. The descriptors came with the answer. Raises ForkServerError, after ending the server, if
        the server does not answer within `timeout` seconds. Children of a server that died or hangs continue to run.
        """
        if self.socket is None:
            raise ForkServerError("the fork server is not running")
        try:
            self.socket.settimeout(timeout)
            send(self.socket, request, files[:MOST_FILES])
            for first in range(MOST_FILES, len(files), MOST_FILES):
                send(self.socket, {}, files[first : first + MOST_FILES])
            message, found, _, _ = socket.recv_fds(self.socket, BUFFER, 1)
            if message:
                return json.loads(message), found
            raise ForkServerError("the fork server ended")
        except OSError as e:
            self._end()
            raise (
                e if isinstance(e, ForkServerError) else ForkServerError(f"the fork server does not answer: {e}")
            ) from e

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # without the variables, BLAS starts threads when NumPy is imported
            env = {**child_environment(), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, str(theirs.fileno()), str(os.getpid())], env=env,
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self.socket = ours
        self.stop = weakref.finalize(self, end, ours, self.process)


def end(s: socket.socket, process: subprocess.Popen[bytes]) -> None:
    """End the fork server `process` by closing its socket `s`. Returns None.

    A server that has not ended after END_TIMEOUT seconds is killed.
    """
    s.close()
    try:
        process.wait(END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def send(s: socket.socket, message: object, files: Sequence[int] = ()) -> None:
    """Send `message` as JSON over the socket `s`, and copies of the file descriptors `files` with it. Returns None.

    Raises OSError if the other end is closed.
    """
    text = json.dumps(message).encode()
    if files:
        socket.send_fds(s, [text], files, socket.MSG_NOSIGNAL)
    else:
        s.send(text, socket.MSG_NOSIGNAL)


class Server:
    """The main loop of the fork server's process: run() answers the parent's requests.

    Args:
        s: the socket to the parent process.
        parent: process id of the parent. The server ends when the parent ends.
    """

    def __init__(self, s: socket.socket, parent: int) -> None:
        self.socket, self.children = s, set[int]()
        self.parent = os.pidfd_open(parent)
        self.poll = select.poll()
        for file in (s.fileno(), self.parent):
            self.poll.register(file, select.POLLIN)

    def run(self) -> None:
        """Answer requests until the parent closes the connection or ends, then kill the children that still run."""
        try:
            while all(file != self.parent for file, _ in self.poll.poll()):
                message, files, _, _ = socket.recv_fds(self.socket, BUFFER, MOST_FILES)
                if not message:
                    return
                self.answer(json.loads(message), files)
        finally:
            for pid in self.children:  # nobody has waited for them, so the numbers are still theirs
                os.kill(pid, signal.SIGKILL)

    def answer(self, request: dict[str, Any], files: list[int]) -> None:
        """Carry out one request from the parent and send the reply. Returns None.

        `request` asks to import modules, to report the status of a child, or to fork a child. `files` are file
        descriptors for the child, which came with the request.
        """
        if "import" in request:
            prepare(request["import"])
            send(self.socket, {})
        elif "status" in request:
            send(self.socket, self.status(request["status"]))
        else:
            while len(files) < request["files"]:
                files += socket.recv_fds(self.socket, BUFFER, MOST_FILES)[1]
            self.fork(files)

    def status(self, pid: int) -> dict[str, object]:
        """Return the reply to a request for the wait status of the child `pid`. Does not wait.

        The reply is {"status": the wait status}, or {"error": text} if the child still runs or is not a child of this
        process.
        """
        try:
            found, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError as e:
            return {"error": str(e)}
        if not found:
            return {"error": "it runs"}
        self.children.discard(pid)
        return {"status": status}

    def fork(self, files: list[int]) -> None:
        """Fork a child. Send its process id and pidfd to the parent, or an error if it cannot be forked. Returns None.

        `files` are file descriptors for the child. The first is a file that describes the child: its target, argument,
        environment and working directory.
        """
        try:
            threads = len(os.listdir("/proc/self/task"))
            if threads > 1:  # a lock that one of them holds would stay locked in the child
                raise OSError(f"modules that were imported have started {threads - 1} threads")
            pid = os.fork()
        except OSError as e:
            close_all(files)
            send(self.socket, {"error": str(e)})
            return
        if not pid:
            become(files)
        close_all(files)
        self.children.add(pid)
        file = os.pidfd_open(pid)
        send(self.socket, {"pid": pid}, [file])
        os.close(file)


def prepare(modules: Iterable[str]) -> None:
    """Import those of the modules that are not imported yet. Returns None.

    Errors are ignored: the child imports the modules again, and reports them.
    """
    new = [module for module in modules if module not in sys.modules]
    for module in new:
        with suppress(Exception):  # the child will raise it where it can be reported
            import_module(module)
    if new:
        gc.collect()
        gc.freeze()  # a collection would write to all objects, whose pages would then be copied


def become(files: Sequence[int]) -> None:
    """Run the forked child: call the function that the request names, then end the process. Does not return.

    The exit status is 0, or 1 if the function raises. The first of the file descriptors `files` is a file with the
    request (JSON). The others are passed to the function.
    """
    try:
        os.setsid()  # a Ctrl-C is for the parent, which drains first
        with os.fdopen(files[0], "rb", closefd=False) as f:
            f.seek(0)
            request = json.loads(f.read())
        kept = {0, 1, 2, *files[1:]}
        for file in map(int, os.listdir("/proc/self/fd")):
            if file not in kept:
                with suppress(OSError):  # the one that listed the folder is closed already
                    os.close(file)
        os.environ.clear()
        os.environ.update(request["env"])
        if "folder" in request:
            os.chdir(request["folder"])
        named(request["target"])(request["argument"], files[1:])
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def main() -> None:
    """Run a fork server, then end the process. Does not return.

    The command line has two arguments: the file descriptor of the server's socket, and the parent's process id.
    """
    file, parent = map(int, sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # it ends with its parent, which may still have streams to finish
    with suppress(OSError):  # the parent is gone
        Server(socket.socket(fileno=file), parent).run()
    os._exit(0)
