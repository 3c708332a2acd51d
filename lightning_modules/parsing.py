"""Reading `-c` files, and what is said about them: one line, with a remedy."""

from __future__ import annotations

import inspect
import re
from difflib import get_close_matches
from pathlib import Path
from pydoc import locate
from typing import Any, ClassVar, NoReturn

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch.cli import LightningArgumentParser

from lightning_modules.configs import find_config
from lightning_modules.errors import shorten
from lightning_modules.secrets import redact_message, remember, secrets_in


class NamedConfigFile(ActionConfigFile):  # type: ignore[misc]
    """A `-c` option that also takes the name of one of our configurations."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: Any) -> None:
        """Read the file that `value` names."""
        place = find_config(value) if isinstance(value, str) else value
        if Path(place).is_file():
            remember(secrets_in(_read(parser, place)))  # known before a message can quote them
            QuiverParser.files = [*QuiverParser.files, str(place)]
        ActionConfigFile.apply_config(parser, cfg, dest, place)


def _read(parser: Any, place: str) -> dict[str, Any]:
    """Read a YAML file that holds settings, or leave with a message that names it."""
    try:
        content = yaml.safe_load(Path(place).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        what = str(error).replace('in "<unicode string>", ', "at ")
        parser.error(f"{place} is no YAML: {what}")
    if not isinstance(content, dict):
        parser.error(f"{place} holds no settings, but {type(content).__name__}")
    settings: dict[str, Any] = content
    return settings


class QuiverParser(LightningArgumentParser):
    """A parser whose error is one line with a remedy, in place of two screens of usage.

    Attributes:
        class_names: Names of classes that work without their package, for suggestions.
        files: The configuration files that were read; the parsers of a command line share it.
    """

    class_names: ClassVar[list[str]] = []
    files: ClassVar[list[str]] = []

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, and exit with 2."""
        if not self.exit_on_error:  # a parser inside another one
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        text = redact_message(shorten(message)).rstrip(".")
        read = f" Read: {', '.join(self.files)}" if self.files else ""
        self.exit(2, f"quiver: error: {text}. {_remedy(text, parser)}{read}\n")


def _remedy(text: str, parser: QuiverParser) -> str:
    """What to do about an error of the parser."""
    if " is no YAML: " in text or " holds no settings" in text:
        return "Mend or restore the file."
    if "File does not exist" in text:
        return "`quiver configs` lists the configurations that come with quiver."
    if "are required" in text:
        return "Give a configuration: quiver fit -c FILE. `quiver configs` lists ours."
    classes = re.findall(r"class_path '([\w.]+)'", text)
    options = {action.dest for action in parser._actions}
    if option := re.search(r"[Oo]ption '([\w.]+)' is not accepted|not accept option '([\w.]+)'", text):
        known = _parameters(classes[-1]) if classes else options
        close = get_close_matches(option[1] or option[2], known, n=1)
    elif unknown := re.search(r"unrecognized arguments: --([\w.]+)", text):
        close = [f"--{name}" for name in get_close_matches(unknown[1], options, n=1)]
    elif short_name := re.search(r"there is no class (\w+)", text):
        close = get_close_matches(short_name[1], QuiverParser.class_names, n=1)
    else:
        close = []
    if close:
        return f"Did you mean {close[0]}?"
    command = parser.prog.replace(" [options]", "")
    part = re.match(r'Parser key "(model|data)"', text)
    help_option = f"--{part[1]}.help {classes[0]}" if part and len(classes) == 1 else "--help"
    return f"`{command} {help_option}` lists what there is."


def _parameters(class_path: str) -> set[str]:
    """Names of a class's constructor arguments, those included that it hands to its bases."""
    found = locate(class_path)
    bases = inspect.getmro(found) if inspect.isclass(found) else ()
    return {name for base in bases if "__init__" in vars(base) for name in inspect.signature(base).parameters}
