"""A PostgreSQL server of one's own for a while: installed where it may be, started, taken away.

Run: `python -m benchmarks.postgresql` starts one, prints its URL and waits for Ctrl-C.
"""

import contextlib
import fcntl
import getpass
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

# A machine without a network must give up in seconds.
_APT = ("apt-get", "-qq", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=5")


class UnavailableError(Exception):
    """There is no server on this machine, and none can be installed; says why."""


@contextlib.contextmanager
def server(durable: bool = False) -> Iterator[str]:
    """Give the URL of an empty database on a free port of the loopback interface.

    The server is found in Debian's or the path's folders, else installed by apt-get where this
    process is root. It keeps its files in a temporary folder, asks for a random password, and ends
    with the block. Not `durable` means without fsync: five times as fast, and a client's death
    looks the same.

    Raises:
      UnavailableError: no server, no driver, or no user to run it.
    """
    if importlib.util.find_spec("psycopg") is None:
        raise UnavailableError("psycopg is not installed: pip install 'hypergrad-jax[postgresql]'")
    binaries = _binaries() or _install()
    user: dict[str, object] = {}
    if os.geteuid() == 0:  # The server refuses to run as root.
        user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    folder = tempfile.mkdtemp(prefix="pg")
    try:
        password = secrets.token_hex(16)
        secret = Path(folder, "password")
        secret.write_text(password)
        if user:
            shutil.chown(folder, "postgres", "postgres")
            shutil.chown(secret, "postgres", "postgres")
        data = f"{folder}/data"
        initdb = [f"{binaries}/initdb", "-D", data, "-U", "hypergrad", "--no-sync", "-E", "UTF8",
                  "--locale=C", "-A", "scram-sha-256", f"--pwfile={secret}"]  # fmt: skip
        made = subprocess.run(initdb, capture_output=True, text=True, cwd=folder, **user)  # type: ignore[call-overload]
        if made.returncode:
            raise UnavailableError(f"initdb failed: {made.stderr.strip()}")
        port = _free_port()
        command = [f"{binaries}/postgres", "-D", data, "-p", str(port), "-h", "127.0.0.1",
                   "-k", folder, "-c", f"fsync={'on' if durable else 'off'}"]  # fmt: skip
        with open(f"{folder}/log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **user)  # type: ignore[call-overload]
        try:
            _await(process, binaries, folder, port)
            yield f"postgresql+psycopg://hypergrad:{password}@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # Ends the clients' sessions, then itself.
            process.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _binaries() -> Path | None:
    """The newest server's folder."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/usr/local/pgsql").glob("bin")]
    found = [f for f in found if (f / "initdb").exists() and (f / "postgres").exists()]
    on_path = shutil.which("initdb")
    if found:
        return max(found, key=lambda f: float(f.parent.name) if f.parent.name.isdigit() else 0.0)
    return Path(on_path).resolve().parent if on_path else None


def _install() -> Path:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise UnavailableError(
            f"no PostgreSQL server here, and {getpass.getuser()} cannot apt-get install one"
        )
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    package = ("install", "-y", "--no-install-recommends", "postgresql")
    # The tests' workers run at the same time.
    with open(Path(tempfile.gettempdir(), "hypergrad-apt.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := _binaries():
            return found
        try:
            for arguments, seconds in (
                (("update",), 60),
                # Only what cannot leave half a package behind has a limit.
                ((*package, "--download-only"), 90),
                (package, None),
            ):
                subprocess.run(
                    [*_APT, *arguments],
                    env=environment,
                    timeout=seconds,
                    check=True,
                    capture_output=True,
                    text=True,
                )
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"apt-get took over {error.timeout:.0f} s") from error
        except subprocess.CalledProcessError as error:
            last = (error.stderr or error.stdout).strip().splitlines()[-1:]
            raise UnavailableError(f"apt-get install postgresql failed: {last}") from error
    found = _binaries()
    if found is None:
        raise UnavailableError("apt-get installed postgresql, but no initdb is to be found")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await(process: subprocess.Popen[bytes], binaries: Path, folder: str, port: int) -> None:
    ready = [f"{binaries}/pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
    end = time.monotonic() + 30
    while subprocess.run(ready).returncode:
        if process.poll() is not None or time.monotonic() > end:
            raise UnavailableError(f"it did not start: {Path(folder, 'log').read_text()[-500:]}")
        time.sleep(0.05)


if __name__ == "__main__":
    with server(durable=True) as url, contextlib.suppress(KeyboardInterrupt):
        print(url, flush=True)
        signal.pause()
