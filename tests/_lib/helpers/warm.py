"""A process that has imported what takes long, and lets a copy of itself run each command: ``python -P warm.py SOCKET``.

Programs in a folder of ``put_programs`` ask it: `vlmprune ...` and `python ...` in a shell then start in a fraction of a second.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

CLIENT = """\
#!{python} -IS
import json, os, socket, sys
there = socket.socket(socket.AF_UNIX)
there.connect({socket!r})
asked = {{"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "cwd": os.getcwd(), "environ": dict(os.environ), "job": {job!r}}}
socket.send_fds(there, [json.dumps(asked).encode() + b"\\n"], [0, 1, 2])
answer = there.recv(16)
sys.exit(int(answer) if answer else 70)
"""


def put_programs(folder: Path, names: Sequence[str], socket_path: Path, job: str) -> None:
    """Programs of these names that have a warm process do ``job`` with their arguments."""
    folder.mkdir()
    for name in names:
        file = folder / name
        file.write_text(CLIENT.format(python=sys.executable, socket=str(socket_path), job=job))
        file.chmod(0o755)


def run(argv: list[str]) -> None:
    """Be a program: ``vlmprune``, or Python with a script or a module."""
    if argv[0] == "vlmprune":
        from vlmprune.cli.main import main

        sys.argv = argv
        return main()
    rest = [word for word in argv[1:] if word != "-P"]
    sys.argv = rest[1:] if rest[0] == "-m" else rest
    if rest[0] == "-m":
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(rest[0]).resolve().parent))
        runpy.run_path(rest[0], run_name="__main__")
    return None


def serve(path: str, jobs: dict[str, Callable[[list[str]], None]]) -> None:
    """Answer until the parent ends. Says "ready" on stdout when the socket is there."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            asking, _ = listening.accept()
            if os.fork() == 0:
                _answer(asking, jobs)
            asking.close()


def _answer(asking: socket.socket, jobs: dict[str, Callable[[list[str]], None]]) -> None:
    """In the copy: take on the caller's place, run, tell it the exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, files, _, _ = socket.recv_fds(asking, 1 << 20, 3)
    while not data.endswith(b"\n"):
        data += asking.recv(1 << 20)
    asked = json.loads(data)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.chdir(asked["cwd"])
    os.environ.update(asked["environ"])
    code = 0
    try:
        jobs[asked["job"]](asked["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
        asking.sendall(str(code).encode())
    os._exit(0)
