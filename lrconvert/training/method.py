"""The low-rank schedule that a recipe asks for."""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lrconvert.recipe import CuttlefishSettings, DenseSettings, PufferfishSettings, Recipe, SIFDSettings
from lrconvert.training.data import Dataset
from lrconvert.training.schedules import Cuttlefish, Dense, LowRankSchedule, Pufferfish, SIFD, StabilityCriterion

_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_NOT_OF_PLANS = {"method", "frobenius_decay"}
