"""What a user sees of an error: the message that helps, and a traceback only where it is of use."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import traceback
from pathlib import Path
from types import TracebackType

from lightning_modules.secrets import redact_message

_HOME = Path(__file__).resolve().parent.parent
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
_OWN = tuple(_HOME / name for name in ("lightning_modules", "datamodules", "callbacks"))
# Lines of jsonargparse's messages that say nothing about the mistake.
_NOISE = re.compile(
    r"(- )?(Does not validate against any of the Union subtypes|Subtypes: |Errors:|Given value type: |"
    r"Given value: ([\[{]|.{80})|Expected a <class 'NoneType'>|Not a valid subclass of |"
    r"Subclass types expect one of|a class path \(str\)|a dict with(out)? )"
)


def report(error: Exception) -> None:
    """Print an error to stderr: one line, after a traceback where somebody else's code failed. No secrets.

    `QUIVER_TRACEBACK=1` shows the whole traceback of any error.

    Args:
        error: What ended the command.
    """
    print(describe(error), file=sys.stderr)  # noqa: T201


def describe(error: BaseException) -> str:
    """Return what `report` prints.

    Args:
        error: What ended the command.
    """
    root = _unwrapped(error)
    lines: list[str] = []
    if os.environ.get("QUIVER_TRACEBACK"):
        lines = traceback.format_exception(error)
    elif not _is_message(root):
        lines = traceback.format_exception(root)
    elif root.__cause__ is not None and _is_own(_origin(root)):
        foreign = _foreign_part(root.__cause__.__traceback__)
        if foreign is not None:
            lines = traceback.format_exception(type(root.__cause__), root.__cause__, foreign)
    lines.append(f"quiver: error: {shorten(str(root)) or type(root).__name__}")
    return redact_message("".join(lines))


def shorten(message: str) -> str:
    """Put a message into one line, without what jsonargparse says beside the point."""
    lines = [line.strip() for line in message.splitlines()]
    text = ""
    for line in lines:
        if line and not _NOISE.match(line):
            joint = "" if not text else "; " if line.startswith("- ") and not text.endswith(":") else " "
            text += joint + line.removeprefix("- ")
    text = text.replace("Expected a dot import path string:", "there is no class")
    text = re.sub(r"a <class '([^']+)'>", r"\1", text)
    return re.sub(r"Type collections\.abc\.Callable\[.*\] expects", "Expected", text)


def _unwrapped(error: BaseException) -> BaseException:
    """The error of a constructor that jsonargparse wraps; any other error as it is."""
    if "jsonargparse" not in _origin(error).parts:
        return error
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    # Of the errors that the types of a union make, only that of the first type is chained.
    causes = frame.f_locals.get("exceptions") or [error.__cause__]
    found = [_unwrapped(one) for one in causes if one is not None]
    of_constructors = [one for one in found if "jsonargparse" not in _origin(one).parts]
    return next(iter(of_constructors or found), error)


def _origin(error: BaseException) -> Path:
    """The file whose code raised an error."""
    frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return Path(frames[-1]).resolve() if frames else Path()


def _is_own(file: Path) -> bool:
    return any(file.is_relative_to(folder) for folder in _OWN)


def _is_message(error: BaseException) -> bool:
    """Whether an error was written for the user, so that its message is enough."""
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, not imported for its name
        return True
    file = _origin(error)
    if isinstance(error, OSError) and {"transformers", "huggingface_hub"} & set(file.parts):
        return True
    return isinstance(error, ValueError | ImportError | OSError) and _is_own(file)


def _foreign_part(frames: TracebackType | None) -> TracebackType | None:
    """The frames from the first on that is neither ours nor Python's; None if there is none."""
    while frames is not None:
        name = frames.tb_frame.f_code.co_filename
        file = Path(name).resolve()
        in_library = file.is_relative_to(_STANDARD_LIBRARY) and "site-packages" not in file.parts
        is_pythons = in_library or name.startswith("<frozen ")  # codecs, importlib
        if not _is_own(file) and not is_pythons:
            return frames
        frames = frames.tb_next
    return None
