"""Can a GPU read host memory that only another process may write? `python sealed.py OUT`: no engine, no torch.

A keeper makes one memfd, maps it, and seals it with F_SEAL_FUTURE_WRITE: from then on nobody can map it to write, and
the keeper alone still can. Readers get it over a socket and map it to read. What this measures, each in a process of
its own: does CUDA register such a mapping, how long does that take, and how fast are copies out of it, beside a mapping
that may be written, CUDA's own pinned memory and memory that is not registered.

Needs Linux, an NVIDIA GPU and libcudart (CUDART=/path/to/libcudart.so where the loader does not find it), and as much
free memory as `--nbytes` (2 GiB) twice. The receipt goes to OUT/sealed.json.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

F_ADD_SEALS, F_GET_SEALS = 1033, 1034
SEALS = {"SEAL": 1, "SHRINK": 2, "GROW": 4, "WRITE": 8, "FUTURE_WRITE": 16}
PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_POPULATE = 1, 2, 0x20, 0x8000
PORTABLE, MAPPED, READ_ONLY = 1, 2, 8
H2D, D2H = 1, 2
ATTRIBUTES = {
    "HostRegisterSupported": 99, "HostRegisterReadOnlySupported": 113, "CanUseHostPointerForRegisteredMem": 91,
    "PageableMemoryAccess": 88, "PageableMemoryAccessUsesHostPageTables": 100,
}  # fmt: skip
PIECE = 1 << 20
"""The keeper's memory says in every MiB which one it is."""
ROUNDS = 8
COPIES = 4

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Failed(Exception):
    """What the system or CUDA said no to."""


def map_it(fd: int, nbytes: int, prot: int, flags: int = MAP_SHARED) -> int:
    found = libc.mmap(None, nbytes, prot, flags, fd, 0)
    if found in (None, ctypes.c_void_p(-1).value):
        raise Failed(f"mmap: {os.strerror(ctypes.get_errno())}")
    return int(found)


def protect(address: int, nbytes: int, prot: int) -> None:
    if libc.mprotect(address, nbytes, prot):
        raise Failed(f"mprotect: {os.strerror(ctypes.get_errno())}")


def said(act: Callable[[], object]) -> str:
    """What came of it: "ok", or the refusal."""
    try:
        act()
    except (Failed, OSError, ValueError) as error:
        return str(error)
    return "ok"


class Cuda:
    """libcudart, as far as this needs it; every call's answer is looked at."""

    def __init__(self) -> None:
        names = (os.environ.get("CUDART"), "libcudart.so.13", "libcudart.so.12", "libcudart.so")
        for name in filter(None, names):
            try:
                self._lib = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise Failed("libcudart was not found: set CUDART")
        self._lib.cudaGetErrorName.restype = ctypes.c_char_p
        self.device = 0
        self("cudaFree", ctypes.c_void_p(0))

    def __call__(self, name: str, *arguments: Any) -> None:
        code = getattr(self._lib, name)(*arguments)
        if code:
            self._lib.cudaGetLastError()
            raise Failed(f"{name}: {self._lib.cudaGetErrorName(code).decode()} ({code})")

    def attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self("cudaDeviceGetAttribute", ctypes.byref(value), number, self.device)
        return value.value

    def versions(self) -> dict[str, int]:
        out = {}
        for name in ("cudaDriverGetVersion", "cudaRuntimeGetVersion"):
            value = ctypes.c_int()
            self(name, ctypes.byref(value))
            out[name] = value.value
        return out

    def on_device(self, nbytes: int) -> int:
        found = ctypes.c_void_p()
        self("cudaMalloc", ctypes.byref(found), ctypes.c_size_t(nbytes))
        return int(found.value or 0)

    def pinned(self, nbytes: int) -> int:
        found = ctypes.c_void_p()
        self("cudaHostAlloc", ctypes.byref(found), ctypes.c_size_t(nbytes), 0)
        return int(found.value or 0)

    def register(self, address: int, nbytes: int, flags: int) -> float:
        started = time.perf_counter()
        self("cudaHostRegister", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), flags)
        return time.perf_counter() - started

    def unregister(self, address: int) -> float:
        started = time.perf_counter()
        self("cudaHostUnregister", ctypes.c_void_p(address))
        return time.perf_counter() - started

    def device_pointer(self, address: int) -> int:
        found = ctypes.c_void_p()
        self("cudaHostGetDevicePointer", ctypes.byref(found), ctypes.c_void_p(address), 0)
        return int(found.value or 0)

    def copy(self, to: int, source: int, nbytes: int, kind: int) -> None:
        self("cudaMemcpy", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(nbytes), kind)

    def copy_s(self, to: int, source: int, nbytes: int, kind: int = H2D) -> float:
        """One copy on a stream, from its launch until it is done."""
        self("cudaDeviceSynchronize")
        started = time.perf_counter()
        self("cudaMemcpyAsync", ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(nbytes), kind, None)
        self("cudaStreamSynchronize", None)
        return time.perf_counter() - started


def make_memory(nbytes: int) -> tuple[int, int, dict[str, str]]:
    """A memfd with room for all of it, mapped to write, filled and sealed: descriptor, address, what was answered."""
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.posix_fallocate(fd, 0, nbytes)
    address = map_it(fd, nbytes, PROT_READ | PROT_WRITE)
    for at in range(0, nbytes, PIECE):
        ctypes.memset(address + at, at // PIECE % 251 + 1, PIECE)
    wanted = SEALS["FUTURE_WRITE"] | SEALS["SHRINK"] | SEALS["GROW"] | SEALS["SEAL"]
    answers = {
        "F_SEAL_WRITE beside a writable mapping": said(lambda: fcntl.fcntl(fd, F_ADD_SEALS, SEALS["WRITE"])),
        "F_SEAL_FUTURE_WRITE, SHRINK, GROW, SEAL": said(lambda: fcntl.fcntl(fd, F_ADD_SEALS, wanted)),
        "seals": str(fcntl.fcntl(fd, F_GET_SEALS)),
    }
    return fd, address, answers


def on_tmpfs() -> str:
    """Whether a file in /dev/shm takes seals."""
    path = Path("/dev/shm") / f"sealed-{os.getpid()}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        return said(lambda: fcntl.fcntl(fd, F_ADD_SEALS, SEALS["FUTURE_WRITE"]))
    finally:
        os.close(fd)
        path.unlink()


def what_a_reader_can_do(fd: int, nbytes: int) -> dict[str, str]:
    """With the descriptor alone, which is open to read and write."""
    readable = map_it(fd, nbytes, PROT_READ)
    return {
        "map to read and write": said(lambda: map_it(fd, nbytes, PROT_READ | PROT_WRITE)),
        "make the reader's mapping writable": said(lambda: protect(readable, nbytes, PROT_READ | PROT_WRITE)),
        "write()": said(lambda: os.pwrite(fd, b"x", 0)),
        "open it anew by /proc, map to write": said(lambda: map_anew(fd, nbytes)),
        "ftruncate": said(lambda: os.ftruncate(fd, nbytes - PIECE)),
        "punch a hole": said(lambda: punch(fd)),
        "take the seals off": said(lambda: fcntl.fcntl(fd, F_ADD_SEALS, 0)),
    }


def map_anew(fd: int, nbytes: int) -> None:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        map_it(again, nbytes, PROT_READ | PROT_WRITE)
    finally:
        os.close(again)


def punch(fd: int) -> None:
    if libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(PIECE)):
        raise Failed(f"fallocate: {os.strerror(ctypes.get_errno())}")


# -- readers: each in a process of its own, for what CUDA refuses may spoil the rest of a process


def registering(fd: int, nbytes: int, flags: int) -> dict[str, Any]:
    """Whether a read-only mapping can be registered with these flags, and what works then."""
    cuda, address = Cuda(), map_it(fd, nbytes, PROT_READ)
    out: dict[str, Any] = {"register": said(lambda: cuda.register(address, nbytes, flags))}
    if out["register"] == "ok":
        device = cuda.on_device(nbytes)
        out["device pointer"] = said(lambda: cuda.device_pointer(address))
        out["copy to the GPU"] = said(lambda: cuda.copy(device, address, nbytes, H2D))
        out["bytes on the GPU are the keeper's"] = str(bytes_are_right(cuda, device, nbytes))
        out["copy from the GPU into it"] = said(lambda: cuda.copy(address, device, PIECE, D2H))
        out["unregister"] = said(lambda: cuda.unregister(address))
    return out


def bytes_are_right(cuda: Cuda, device: int, nbytes: int, *, first: int | None = None) -> bool:
    back = ctypes.create_string_buffer(PIECE)
    for at in range(0, nbytes, PIECE):
        cuda.copy(ctypes.addressof(back), device + at, PIECE, D2H)
        wanted = first if at == 0 and first is not None else at // PIECE % 251 + 1
        if back.raw.count(wanted) != PIECE:
            return False
    return True


def recycled(fd: int, nbytes: int, pipe: Any, flags: int) -> dict[str, Any]:
    """The keeper writes a slot anew while a reader has it registered: does the next copy bring the new bytes?"""
    cuda, address = Cuda(), map_it(fd, nbytes, PROT_READ)
    cuda.register(address, nbytes, flags)
    device = cuda.on_device(nbytes)
    cuda.copy(device, address, nbytes, H2D)
    before = bytes_are_right(cuda, device, nbytes)
    pipe.send("write the first piece anew")
    pipe.recv()
    cuda.copy(device, address, nbytes, H2D)
    return {"before": str(before), "after": str(bytes_are_right(cuda, device, nbytes, first=252))}


def measured(fd: int, nbytes: int, flags: int | None) -> dict[str, list[dict[str, float]]]:
    """The arms in turn, ROUNDS times, each pass with a registration of its own: register, copies, unregister."""
    cuda = Cuda()
    device = cuda.on_device(nbytes)
    own_fd = os.memfd_create("writable")
    os.posix_fallocate(own_fd, 0, nbytes)
    readable, unregistered = map_it(fd, nbytes, PROT_READ), map_it(fd, nbytes, PROT_READ)
    writable = map_it(own_fd, nbytes, PROT_READ | PROT_WRITE)
    ctypes.memset(writable, 7, nbytes)
    pinned = cuda.pinned(nbytes)
    ctypes.memset(pinned, 9, nbytes)

    def registered(address: int, with_flags: int) -> dict[str, float]:
        register_s = cuda.register(address, nbytes, with_flags)
        out = copies(cuda, device, address, nbytes)
        return {"register_s": register_s, **out, "unregister_s": cuda.unregister(address)}

    arms: dict[str, Callable[[], dict[str, float]]] = {
        "pinned": lambda: copies(cuda, device, pinned, nbytes),
        "writable": lambda: registered(writable, 0),
        "unregistered": lambda: copies(cuda, device, unregistered, nbytes),
    }
    if flags is not None:
        arms["sealed"] = lambda: registered(readable, flags)
    out: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for number in range(ROUNDS + 1):
        for name in sorted(arms, reverse=bool(number % 2)):
            found = arms[name]()
            if number:
                out[name].append(found)
    return out


def copies(cuda: Cuda, device: int, address: int, nbytes: int) -> dict[str, float]:
    taken = [cuda.copy_s(device, address, nbytes) for _ in range(COPIES)]
    return {"copy_s": statistics.median(taken), "nbytes": float(nbytes)}


def written_first(nbytes: int) -> dict[str, str]:
    """The next best: the reader's mapping is made to write before the seal, registered, and then made read-only."""
    cuda = Cuda()
    fd = os.memfd_create("first", os.MFD_ALLOW_SEALING)
    os.posix_fallocate(fd, 0, nbytes)
    address = map_it(fd, nbytes, PROT_READ | PROT_WRITE)
    ctypes.memset(address, 7, nbytes)
    out = {
        "register": said(lambda: cuda.register(address, nbytes, 0)),
        "make it read-only": said(lambda: protect(address, nbytes, PROT_READ)),
        "seal": said(lambda: fcntl.fcntl(fd, F_ADD_SEALS, SEALS["FUTURE_WRITE"] | SEALS["SHRINK"])),
    }
    device = cuda.on_device(nbytes)
    taken = min(cuda.copy_s(device, address, nbytes) for _ in range(5))
    out["copy, GB/s"] = f"{nbytes / taken / 1e9:.1f}"
    out["make it writable again"] = said(lambda: protect(address, nbytes, PROT_READ | PROT_WRITE))
    return out


# -- the keeper


def reader(act: Callable[..., Any], *arguments: Any, serve: Callable[[Any], None] | None = None) -> Any:
    """What `act` gives in a fresh process that gets the keeper's descriptor over a socket."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    fds = [argument for argument in arguments if isinstance(argument, Descriptor)]
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    process = multiprocessing.get_context("spawn").Process(
        target=_run, args=(there, theirs, act, arguments, serve is not None)
    )
    process.start()
    theirs.close()
    if fds:
        socket.send_fds(ours, [b"fd"], [fd.number for fd in fds])
    if serve is not None:
        serve(here)
    there.close()
    try:
        found = here.recv() if here.poll(150) else {"error": "no answer within 150 s"}
    except EOFError:
        process.join(5)
        found = {"error": f"the process ended with {process.exitcode}"}
    process.join(10)
    if process.is_alive():
        process.kill()
    return found


class Descriptor:
    """A file that travels over the socket."""

    def __init__(self, number: int) -> None:
        self.number = number


def _run(pipe: Any, sock: socket.socket, act: Callable[..., Any], arguments: tuple[Any, ...], talks: bool) -> None:
    try:
        given = list(arguments)
        wanted = [i for i, argument in enumerate(given) if isinstance(argument, Descriptor)]
        if wanted:
            for i, fd in zip(wanted, socket.recv_fds(sock, 8, len(wanted))[1], strict=True):
                given[i] = fd
        pipe.send(act(*given, pipe) if talks else act(*given))
    except BaseException as error:  # noqa: BLE001 - told to the keeper
        pipe.send({"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-1500:]})


def recycled_with(flags: int) -> Callable[..., Any]:
    return {READ_ONLY: _recycled_read_only, 0: _recycled_plain}[flags]


def _recycled_read_only(fd: int, nbytes: int, pipe: Any) -> dict[str, Any]:
    return recycled(fd, nbytes, pipe, READ_ONLY)


def _recycled_plain(fd: int, nbytes: int, pipe: Any) -> dict[str, Any]:
    return recycled(fd, nbytes, pipe, 0)


def about_the_gpu() -> dict[str, Any]:
    cuda = Cuda()
    return {**{name: cuda.attribute(number) for name, number in ATTRIBUTES.items()}, **cuda.versions()}


def main(out: Path, nbytes: int, cuda: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    fd, address, sealing = make_memory(nbytes)
    keeper = Descriptor(fd)
    found: dict[str, Any] = {"sealing": sealing, "a file in /dev/shm": on_tmpfs()}

    def keep() -> None:
        (out / "sealed-answers.json").write_text(json.dumps(found, indent=1))

    found["reader"] = reader(what_a_reader_can_do, keeper, nbytes)
    found["the keeper still writes"] = said(lambda: ctypes.memset(address, 1, PIECE))
    keep()
    if not cuda:
        print(json.dumps(found, indent=1))
        return
    found["gpu"] = reader(about_the_gpu)
    keep()
    for name, flags in {
        "no flag": 0, "portable": PORTABLE, "mapped": MAPPED, "read-only": READ_ONLY,
        "read-only, portable, mapped": READ_ONLY | PORTABLE | MAPPED,
    }.items():  # fmt: skip
        found[f"register, {name}"] = reader(registering, keeper, nbytes, flags)
        keep()
    works = next((f for n, f in (("read-only", READ_ONLY), ("no flag", 0)) if _ok(found[f"register, {n}"])), None)

    def serve(pipe: connection.Connection) -> None:
        if pipe.poll(60):
            pipe.recv()
            ctypes.memset(address, 252, PIECE)
            pipe.send("done")

    if works is not None:
        found["recycled"] = reader(recycled_with(works), keeper, nbytes, serve=serve)
        ctypes.memset(address, 1, PIECE)
    found["written first, then made read-only"] = reader(written_first, nbytes)
    keep()
    rounds = reader(measured, keeper, nbytes, works)
    found["rounds"] = rounds
    keep()
    print(json.dumps({name: value for name, value in found.items() if name != "rounds"}, indent=1))
    if "error" in rounds:
        print(rounds)
        sys.exit(1)
    for name, rows in rounds.items():
        speed = statistics.median(row["nbytes"] / row["copy_s"] / 1e9 for row in rows)
        register = statistics.median(row.get("register_s", 0.0) for row in rows)
        print(f"{name:14} {speed:6.1f} GB/s  register {register * 1e3:7.1f} ms")
    seal(out / "sealed.json", found, rounds, nbytes, works)


def _ok(answer: dict[str, Any]) -> bool:
    return answer.get("register") == "ok" and answer.get("bytes on the GPU are the keeper's") == "True"


TEXTS = {
    "sealed": ("the sealed mapping", "a read-only mapping of the keeper's memory, registered in the reader"),
    "writable": ("a writable mapping", "a memfd of the reader's own, mapped to write, registered without a flag"),
    "pinned": ("CUDA's pinned memory", "memory of cudaHostAlloc; it is not registered here"),
    "unregistered": ("not registered", "the keeper's memory, mapped read-only and not registered"),
}  # fmt: skip


def seal(path: Path, found: dict[str, Any], rounds: dict[str, Any], nbytes: int, works: int | None) -> None:
    from thaw import receipt as r
    from thaw.receipt.machine import software, this_machine

    arms = [
        r.Arm(
            name=name, title=TEXTS[name][0], text=f"{TEXTS[name][1]}; the median of {COPIES} copies",
            rounds=tuple(r.Round(pair=i, values=row) for i, row in enumerate(rounds[name])),
        )
        for name in TEXTS if name in rounds
    ]  # fmt: skip
    derived = []
    for arm in arms:
        copy = r.Term(arm=arm.name, value="copy_s")
        derived.append(r.median(f"{arm.name}.copy", f"{arm.title}: copy to the GPU", "s", copy))
        if "register_s" in arm.rounds[0].values:
            text = f"{arm.title}: cudaHostRegister"
            derived.append(r.median(f"{arm.name}.register", text, "s", r.Term(arm=arm.name, value="register_s")))
    for name in ("sealed", "writable", "unregistered"):
        if name in rounds:
            over, under = r.Term(arm="pinned", value="copy_s"), r.Term(arm=name, value="copy_s")
            text = f"{TEXTS[name][0]}: speed as a part of pinned memory's"
            derived.append(r.ratio(f"speed.{name}", text, over, under))
    notes = [f"{name}: {json.dumps(value, sort_keys=True)}"[:4000] for name, value in found.items() if name != "rounds"]
    receipt = r.make(
        kind="gpu.sealed", command=f"python benchmarks/gpu/sealed.py OUT --nbytes {nbytes}",
        versions=software(), machine=this_machine(_card()), model=None,
        parameters={"nbytes": nbytes, "rounds": ROUNDS, "copies": COPIES, "kernel": os.uname().release,
                    "flags": "none works" if works is None else works},
        arms=arms, derived=derived, notes=notes,
    )  # fmt: skip
    path.write_bytes(r.dumps(receipt))
    print(f"{path.name}: {receipt.digest}")


def _card() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "GPU"


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("out", type=Path)
    words.add_argument("--nbytes", type=int, default=2 << 30)
    words.add_argument("--no-gpu", action="store_true", help="the seals alone")
    told = words.parse_args()
    main(told.out, told.nbytes, not told.no_gpu)
