"""What thaw knows of a kind of engine: how one is loaded, joined, recognised, started as a server and looked into.

An entry point of group `thaw.engines` names an object of a class made from `EngineKind`:

    [project.entry-points."thaw.engines"]
    mine = "my_package.kind:KIND"

`thaw.load_engine`, `thaw.attach`, `thaw up`, `thaw doctor` and the benches ask these objects and know no
engine by name. Importing the module of a kind, and asking it anything but `load` and `attach`, must import no torch and
no engine: all kinds are asked whose server an address is.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from thaw.core.errors import InvalidRequest, Unsupported

if TYPE_CHECKING:
    from thaw.core.findings import Finding
    from thaw.engines.base import Engine


@dataclass(frozen=True)
class Wanted:
    """A server that is to be started. `stores`: by UUID the folders of packs that it may use from its start. `folder`:
    where a file for it may lie. `arguments`: the engine's own, which go before thaw's."""

    model: str
    host: str
    port: int
    python: str
    folder: Path
    stores: Mapping[str, str]
    arena_nbytes: int | None = None
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """How it is started. `environment`: what is added to ours. `mail`: the folder that client and engine share,
    `config`: the file that the server reads; empty where it has none."""

    command: list[str]
    mail: str = ""
    config: str = ""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What `thaw engine config` was told. `beside`: what stands beside thaw's plug-in, as the engine takes it."""

    stores: Mapping[str, str]
    mail: str | None = None
    arena_nbytes: int | None = None
    spill: str | None = None
    beside: tuple[str | Mapping[str, object], ...] = ()


@dataclass(frozen=True)
class ConfigFile:
    """`mail` as in `Start`."""

    text: str
    mail: str


class Server(abc.ABC):
    """The server of a kind of engine. It says that it is well by answering GET /health with status 200."""

    title: ClassVar[str]
    """Its name in a sentence."""
    package: ClassVar[str]
    """The module that the Python which runs it must have, beside thaw."""
    install: ClassVar[str]
    """A sentence without its full stop: how to come by that Python."""
    by_hand: ClassVar[str]
    """How one that thaw is in is started without `thaw up`."""
    log_prefix: ClassVar[str] = ""
    """A regular expression: what begins a line of its log and says nothing of what it is doing."""
    config_suffixes: ClassVar[tuple[str, ...]] = ()
    """How the name of a file for `thaw engine config` may end; none: it reads no file."""

    @abc.abstractmethod
    def start(self, wanted: Wanted) -> Start:
        """The command of a server with thaw in it. It may write the file that the server reads, and starts nothing."""

    def needs(self, model: str) -> Mapping[str, str]:
        """Modules beside `package` that the Python which runs it must have for this model; with each why, and what to
        do, as sentences without the last full stop."""
        return {}

    def config_file(self, told: Settings) -> ConfigFile:
        """The file that loads thaw into it. Raises `Unsupported` where it reads none."""
        raise Unsupported(f"{self.title} reads no file of thaw's ({self.by_hand})")

    def config_commands(self, config: Path) -> Sequence[tuple[list[str], str]]:
        """Commands that start it with such a file, each with a remark (or ""); the usual one first."""
        raise Unsupported(f"{self.title} reads no file of thaw's ({self.by_hand})")

    def joined(self, url: str) -> Iterator[Finding]:
        """The doctor's findings at the address of a server that somebody else started: whether it answers (named
        `server`) and thaw is active there (`connector`). May take a minute; raises nothing."""
        return iter(())

    def started(self, mail: Path, log: str) -> Iterator[Finding]:
        """Those about the server that `thaw up` started on this machine, which answers."""
        return iter(())


class EngineKind(abc.ABC):
    """A kind of engine. One object of it serves the whole process; it keeps no state."""

    name: ClassVar[str]
    """As in the registry; `EngineInfo.name` of its engines."""
    needs_model: ClassVar[bool] = True
    """Whether `load` must be told a `model`."""
    takes_model: ClassVar[bool] = True
    """Whether a `model` says what it loads."""
    server: ClassVar[Server | None] = None
    key_variable: ClassVar[str | None] = None
    """The environment variable in which its own server looks for its API key."""
    packages: ClassVar[tuple[str, ...]] = ()
    """Modules that `load` imports; the doctor says whether they are there."""
    builds: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Distributions that bring one of these, where that is not one of its own name alone."""
    advice: ClassVar[str] = ""
    """What to do where a package is missing."""
    software: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    """Distributions on which its figures depend."""
    quiet: ClassVar[Mapping[str, str]] = {}
    """Environment variables that turn its own bars and warnings off."""
    modest: ClassVar[Mapping[str, object]] = {}
    """Options of `load` for an engine that lives for a moment."""
    modest_environment: ClassVar[Mapping[str, str]] = {}
    """What keeps several of them on one machine from taking all of its memory."""

    stored: ClassVar[Mapping[str, str]] = {}
    """What it is told, by its own arguments' names, to load a model whose tensors lie in a store."""

    @abc.abstractmethod
    def load(self, **options: Any) -> Engine:
        """Boot one of this process's own. Raises `NotFound` where a package is missing."""

    def attach(self, target: Any, *, policy: str = "0", api_key: str | None = None, **options: Any) -> Engine:
        """Join one that runs: an address, or an object that it `recognises`. It goes on when the engine is closed.
        Raises `NotFound` when nobody is there, `InvalidRequest` for an option that it does not know."""
        raise Unsupported(f"engine {self.name} is loaded into this process; it has no server to join by a URL")

    def recognises(self, target: object) -> bool:
        """Whether `attach` takes this object of the program's; found by the names of its classes, without importing."""
        return False

    def serves(self, url: str, api_key: str | None = None) -> bool:
        """Whether the server there is one of its own. Asked in a few seconds; False when nobody answers. Raises
        `InvalidRequest` for a key that cannot be sent."""
        return False

    def findings(self) -> Iterator[Finding]:
        """What the doctor should say of this environment besides `packages`; names begin with the kind's own."""
        return iter(())

    def on_cores(self, cores: Sequence[int]) -> dict[str, str]:
        """The environment that keeps an engine's process to these cores, where it does not keep to them by itself."""
        return {}


def called(name: str, make: Callable[..., Engine], /, *given: Any, **options: Any) -> Engine:
    """What `make` makes. Raises `InvalidRequest` for an option that it has not, or for one that is missing."""
    import inspect  # 20 ms that naming an engine need not cost

    try:
        inspect.signature(make).bind(*given, **options)
    except TypeError as error:
        raise InvalidRequest(f"engine {name}: {error}") from None
    return make(*given, **options)


def refuse_options(options: Mapping[str, object]) -> None:
    """For an `attach` that takes none. Raises `InvalidRequest` naming them."""
    if options:
        raise InvalidRequest(f"{', '.join(options)}: only for a model in this process; a running engine has its own")
