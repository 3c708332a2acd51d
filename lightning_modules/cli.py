"""The `quiver` command: a front end that answers and dispatches without importing lightning."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lightning_modules.errors import report

PACKAGES = ("lightning_modules", "datamodules", "callbacks")

RUN_COMMANDS = ("fit", "validate", "test", "predict")

# Commands that train nothing, as "module:function"; jsonargparse makes their options from the signature.
LIGHT_COMMANDS = {
    "configs": "lightning_modules.configs:list_configs",
    "consolidate": "lightning_modules.consolidate:consolidate_checkpoint",
    "export": "lightning_modules.export:export_adapter",
    "merge": "lightning_modules.merging.merge:merge_experts",
    "rollouts": "lightning_modules.grpo.viewer:show_rollouts",
}
LIBRARY_COMMANDS = {
    "add": "lightning_modules.library.commands:add_adapters",
    "remove": "lightning_modules.library.commands:remove_adapters",
    "list": "lightning_modules.library.commands:list_adapters",
    "show": "lightning_modules.library.commands:show_adapter",
    "verify": "lightning_modules.library.commands:verify_library",
    "cluster": "lightning_modules.library.cluster_command:cluster_library",
    "route": "lightning_modules.library.route_command:route_prompts",
    "export": "lightning_modules.library.export_command:export_library",
    "push": "lightning_modules.library.commands:push_library",
    "pull": "lightning_modules.library.commands:pull_library",
}

_SECONDS_TO_LEAVE = 5.0  # in which threads of rewards and libraries can end by themselves

USAGE = """usage: quiver COMMAND [options]

Post-train language models with PyTorch Lightning.

Commands that run a model, from one YAML or several, later ones winning:
  fit        train                    quiver fit -c grpo/demo.yaml
  validate   evaluate, validation set quiver validate -c grpo/demo.yaml --ckpt_path FILE
  test       evaluate, test set
  predict    generate completions
  plan       say what a run needs     quiver plan grpo/demo.yaml --devices 8 --gpu H100-80GB

Commands that train nothing:
  configs    list the configurations that come with quiver
  export     merge an adapter folder into a plain Hugging Face folder, or turn a sparse one into SHiRA
  consolidate  turn a checkpoint folder that many ranks wrote into one file
  merge      merge experts            quiver merge --method ties --experts A B --output FOLDER
  rollouts   show what a GRPO run wrote and earned   quiver rollouts runs/demo --step 10-20 --limit 3
  library    keep experts in a folder: add, remove, list, show, verify, cluster, route, export, ...

quiver fit -c FILE --print_config   shows every setting with its value
quiver fit --help                   lists the options of a command
quiver fit -c FILE --trainer.max_steps 10 --model.num_generations 4   overrides settings
QUIVER_FIT__TRAINER__MAX_STEPS=10   sets what no file and no option sets; QUIVER_FIT__CONFIG names a file
QUIVER_TRACEBACK=1                  shows the traceback of an error
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program name; None takes those of the process.

    Returns:
        The exit code: 0; 1 after an error, whose message was printed; 2 for an unknown command; 130 after
        Ctrl-C and 143 after SIGTERM, with several ranks that of rank 0. Wrong options raise `SystemExit(2)`.
    """
    if argv is None:
        return _leave(main(sys.argv[1:]))
    arguments = argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    # A user's own module in this folder works as a class path. Appended, so that it can shadow nothing.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        check_packages()
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes it an exit with 1
            return int(getattr(stop.__context__, "exit_code", 130))
        raise
    except Exception as error:
        report(error)
        return 1


def _leave(code: int) -> int:
    """Return the exit code, and see that the process ends: a thread of a reward may never do so."""
    threading.Thread(target=_end_later, args=(code,), name="quiver-end", daemon=True).start()
    return code


def _end_later(code: int) -> None:
    """End the process where threads, for which Python waits, outlive the command by seconds."""
    time.sleep(_SECONDS_TO_LEAVE)
    left = [
        one.name for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()
    ]
    if left:
        sys.stderr.write(
            f"Left behind: thread {', '.join(left)}. Start threads of your own with daemon=True.\n"
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _dispatch(arguments: list[str]) -> int:
    name, *rest = arguments
    if name in LIGHT_COMMANDS:
        return _call(LIGHT_COMMANDS[name], rest, f"quiver {name}")
    if name == "library":
        if not rest or rest[0] not in LIBRARY_COMMANDS:
            listed = ", ".join(LIBRARY_COMMANDS)
            wrong = f"unknown command {rest[0]!r}. " if rest and not rest[0].startswith("-") else ""
            print(f"quiver library: {wrong}There are {listed}.", file=sys.stderr if wrong else sys.stdout)
            return 2 if wrong else 0
        return _call(LIBRARY_COMMANDS[rest[0]], rest[1:], f"quiver library {rest[0]}")
    if name.startswith("-"):
        print(
            f"quiver: error: {name!r} comes before the command. Write: quiver fit {name} ...", file=sys.stderr
        )
        return 2
    if name == "plan":
        return int(importlib.import_module("lightning_modules.planning.command").run(rest))
    if name not in RUN_COMMANDS:
        known = [*RUN_COMMANDS, *LIGHT_COMMANDS, "library", "plan"]
        close = get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]}?" if close else f"There are {', '.join(known)}."
        print(f"quiver: error: unknown command {name!r}. {hint}", file=sys.stderr)
        return 2
    return int(importlib.import_module("lightning_modules.training_cli").run(arguments))


def _call(place: str, arguments: list[str], program: str) -> int:
    """Call a "module:function" with options made from its signature."""
    from jsonargparse import auto_cli

    module, function_name = place.split(":")
    function = getattr(importlib.import_module(module), function_name)
    auto_cli(
        function,
        args=_spell_lists(function, _spell_flags(function, arguments)),
        as_positional=True,
        prog=program,
        allow_abbrev=False,
    )
    return 0


def _spell_flags(function: Callable[..., Any], arguments: list[str]) -> list[str]:
    """Let a bool be set by its name alone: `--live` is `--live=true` for jsonargparse."""
    parameters = inspect.signature(function).parameters.values()
    flags = {f"--{one.name}" for one in parameters if one.annotation in (bool, "bool")}
    pairs = zip(arguments, [*arguments[1:], ""], strict=False)  # without arguments, without pairs
    return [f"{one}=true" if one in flags and after not in ("true", "false") else one for one, after in pairs]


def _spell_lists(function: Callable[..., Any], arguments: list[str]) -> list[str]:
    """Let lists take several values: `--names a b` is `--names+ a --names+ b` for jsonargparse.

    A list without default is spelled `a b` too, as the last of the values that come before all options.
    """
    parameters = inspect.signature(function).parameters.values()
    required = [one for one in parameters if one.default is one.empty]
    if required and str(required[-1].annotation).startswith("list["):
        leading = next((i for i, one in enumerate(arguments) if one.startswith("-")), len(arguments))
        first = len(required) - 1
        if leading > first:
            arguments = [*arguments[:first], json.dumps(arguments[first:leading]), *arguments[leading:]]
    lists = {f"--{one.name}" for one in parameters if str(one.annotation).startswith("list[")}
    spelled: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("-"):
            option = argument if argument in lists else None
        if option is None:
            spelled.append(argument)
        elif not argument.startswith("-"):
            spelled += [option if argument.startswith("[") else f"{option}+", argument]
    return spelled


def check_packages() -> None:
    """Check that the three packages are ours.

    Raises:
        ImportError: If a foreign package of the same name comes first on the path.
    """
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != home / name:
            raise ImportError(
                f"The package {name!r} is {found or 'missing'}, not quiver's own in {home}. Uninstall or "
                "rename the foreign package, or take its folder off PYTHONPATH."
            )


if __name__ == "__main__":
    sys.exit(main())
