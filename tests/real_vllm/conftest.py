"""Collected only where vLLM is installed: `make test-vllm`."""

from importlib.metadata import PackageNotFoundError, version

try:
    version("vllm")
except PackageNotFoundError:
    collect_ignore_glob = ["test_*"]
