"""The configurations that travel in the wheel, found by name from any folder."""

from __future__ import annotations

from pathlib import Path


def configs_folder() -> Path:
    """Return the folder of our configurations: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str) -> str:
    """Resolve a `-c` argument.

    Args:
        name: An existing file of the user's, else the name of one of ours, with or without `configs/`.

    Returns:
        The path of the file; `name` itself where it is neither, so that the parser reports it.
    """
    if Path(name).exists():
        return name
    ours = configs_folder() / name.removeprefix("configs/")
    return str(ours) if ours.is_file() else name


def list_configs() -> None:
    """List the configurations that come with quiver, with the first line of each."""
    folder = configs_folder()
    for file in sorted(folder.rglob("*.yaml")):
        title = file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        print(f"{file.relative_to(folder).as_posix():32} {title}")  # noqa: T201
