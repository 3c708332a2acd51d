"""Callbacks: what they do is their name."""

from callbacks.adapter_export import AdapterExport
from callbacks.contrast_view import ContrastView
from callbacks.graceful_stop import GracefulStop
from callbacks.held_out_gain import HeldOutGain
from callbacks.learning_curve import LearningCurve
from callbacks.library_export import LibraryExport
from callbacks.prompt_curriculum import PromptCurriculum
from callbacks.rank_watch import RankWatch
from callbacks.rollout_table import RolloutTable
from callbacks.routing_report import RoutingReport
from callbacks.run_number import RunNumber
from callbacks.sparse_stats import SparseStats
from callbacks.training_alarm import TrainingAlarm
from callbacks.wandb_run import WandbRun

__all__ = [
    "AdapterExport",
    "ContrastView",
    "GracefulStop",
    "HeldOutGain",
    "LearningCurve",
    "LibraryExport",
    "PromptCurriculum",
    "RankWatch",
    "RolloutTable",
    "RoutingReport",
    "RunNumber",
    "SparseStats",
    "TrainingAlarm",
    "WandbRun",
]
