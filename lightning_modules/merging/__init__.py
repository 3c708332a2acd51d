"""Merging: one change of the weights out of the changes of several experts. Functions of torch alone."""

from lightning_modules.merging.elementwise import (
    average,
    breadcrumbs,
    consensus,
    dare,
    overlap_average,
    sign_consistent_average,
    task_arithmetic,
    ties,
)
from lightning_modules.merging.lora import LoraFactors, as_lora, average_factors, factor_average, lora_delta
from lightning_modules.merging.spectral import iso_c, tsv_m
from lightning_modules.merging.vectors import Delta, TaskVector

__all__ = [
    "Delta",
    "LoraFactors",
    "TaskVector",
    "as_lora",
    "average",
    "average_factors",
    "breadcrumbs",
    "consensus",
    "dare",
    "factor_average",
    "iso_c",
    "lora_delta",
    "overlap_average",
    "sign_consistent_average",
    "task_arithmetic",
    "ties",
    "tsv_m",
]
