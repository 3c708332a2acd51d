"""DataModules: rows of text for every LightningModule of Quiver. A leaf that imports no sibling package."""

from datamodules.arithmetic import ArithmeticDataModule
from datamodules.base import TextDataModule
from datamodules.batches import Answer, Message, Prompt, TextBatch
from datamodules.hub import HubDataModule
from datamodules.jsonl import JsonlDataModule
from datamodules.multitask import MultiTaskDataModule
from datamodules.reasoning_gym import ReasoningGymDataModule

__all__ = [
    "Answer",
    "ArithmeticDataModule",
    "HubDataModule",
    "JsonlDataModule",
    "Message",
    "MultiTaskDataModule",
    "Prompt",
    "ReasoningGymDataModule",
    "TextBatch",
    "TextDataModule",
]
