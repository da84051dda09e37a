"""Verbs that only read, declared as plain values: click is a third of what such a command costs.

A `Light` verb reads its words itself where each is what it was declared to be. Everything else (--help, an abbreviated
option, `-n5`, a word that is wrong) it leaves to the click command made from the same declaration, so there is one
declaration, and click alone says what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click

PLACE = ("-C", "--repo")
NAMED = "named"
MOST = 1_000_000_000
"""Of anything that is counted."""


class Argument:
    """A word in its place; `many`: all that are left, as a tuple."""

    def __init__(
        self,
        name: str,
        required: bool = False,
        default: str | None = None,
        many: bool = False,
        metavar: str | None = None,
    ) -> None:
        self.name, self.required, self.default, self.many, self.metavar = name, required, default, many, metavar


class Flag:
    """An option without a value."""

    def __init__(self, name: str, words: tuple[str, ...], help: str) -> None:
        self.name, self.words, self.help = name, words, help


class LightText:
    """An option with a text as its value."""

    def __init__(self, name: str, words: tuple[str, ...], help: str, metavar: str) -> None:
        self.name, self.words, self.help, self.metavar = name, words, help, metavar


class LightNumber:
    """An option with a number from `least` to `MOST`."""

    def __init__(
        self,
        name: str,
        words: tuple[str, ...],
        kind: type[int] | type[float],
        least: float,
        help: str,
        metavar: str = "N",
    ) -> None:
        self.name, self.words, self.kind, self.least, self.help = name, words, kind, least, help
        self.metavar = metavar


Parameter = Argument | Flag | LightText | LightNumber
AS_JSON = Flag("as_json", ("--json",), "Print one JSON document instead of text.")


class Light:
    """One verb. `function` gets what the words say by name, and `named` (-C)."""

    def __init__(
        self, name: str, example: str, parameters: Sequence[Parameter], function: Callable[..., int | None]
    ) -> None:
        self.name, self._example, self._parameters, self.function = name, example, (*parameters, AS_JSON), function

    def read(self, words: Sequence[str], named: str | None) -> dict[str, Any] | None:
        """The function's arguments; None where click must say what the words mean."""
        options = {word: each for each in self._parameters if not isinstance(each, Argument) for word in each.words}
        found: dict[str, Any] = {NAMED: named}
        places: list[str] = []
        left = iter(words)
        for word in left:
            option = options.get(word)
            if isinstance(option, Flag):
                found[option.name] = True
            elif isinstance(option, LightNumber | LightText) or word in PLACE:
                value = next(left, None)
                if value is None or value.startswith("-"):
                    return None
                said = _number(option, value) if isinstance(option, LightNumber) else value
                if said is None:
                    return None
                found[NAMED if option is None else option.name] = said
            elif word.startswith("-"):
                return None
            else:
                places.append(word)
        given = self._placed(places)
        if given is None:
            return None
        for each in options.values():
            found.setdefault(each.name, False if isinstance(each, Flag) else None)
        return found | given

    def _placed(self, places: list[str]) -> dict[str, Any] | None:
        found: dict[str, Any] = {}
        for each in self._parameters:
            if not isinstance(each, Argument):
                continue
            if each.many:
                found[each.name], places = tuple(places), []
            elif places:
                found[each.name], *places = places
            elif each.required:
                return None
            else:
                found[each.name] = each.default
        return None if places else found

    def command(self) -> click.Command:
        """The same verb for click."""
        import click

        from thaw.cli import options

        function, more = self.function, dict[str, Any]()
        for each in reversed(self._parameters):
            if isinstance(each, Argument):
                more = {"nargs": -1} if each.many else {"required": each.required}
                if each.default is not None:
                    more = {"default": each.default}
                if each.metavar is not None:
                    more["metavar"] = each.metavar
                function = click.argument(each.name, **more)(function)
            elif isinstance(each, Flag):
                function = click.option(*each.words, each.name, is_flag=True, help=each.help)(function)
            elif isinstance(each, LightText):
                function = click.option(*each.words, each.name, metavar=each.metavar, help=each.help)(function)
            else:
                is_int = each.kind is int
                kind = click.IntRange(int(each.least), MOST) if is_int else options.Number(each.least, MOST)
                function = click.option(*each.words, each.name, type=kind, metavar=each.metavar, help=each.help)(
                    function
                )
        return options.verb(self.name, self._example)(function)


def verb(name: str, example: str, *parameters: Parameter) -> Callable[[Callable[..., int | None]], Light]:
    """Declares the function below as a verb. Its docstring is the help text; --json is added."""
    return lambda function: Light(name, example, parameters, function)


def usage(message: str) -> Exception:
    """What to raise for words that do not go together."""
    import click

    return click.UsageError(message)


def plain(words: Sequence[str], verbs: Sequence[str]) -> Callable[[], int | None] | None:
    """The call that `words` ask for, where their verb is one of `verbs` and all of them are plain; else None."""
    named = None
    while len(words) > 1 and words[0] in PLACE:
        named, words = words[1], words[2:]
    if not words or words[0] not in verbs or "_THAW_COMPLETE" in os.environ:
        return None
    from importlib import import_module

    light: Light = import_module(f"thaw.cli.verbs.{words[0]}").command
    given = light.read(words[1:], named)
    return None if given is None else lambda: light.function(**given)


def _number(option: LightNumber, text: str) -> int | float | None:
    try:
        number = option.kind(text)
    except ValueError:
        return None
    return number if option.least <= number <= MOST else None
