"""When a network that is being trained becomes low rank, and at which ranks: one file a schedule."""

from lrconvert.training.schedules.cuttlefish import Cuttlefish
from lrconvert.training.schedules.dense import Dense
from lrconvert.training.schedules.pufferfish import Pufferfish
from lrconvert.training.schedules.rank_curves import RankCurves, StabilityCriterion
from lrconvert.training.schedules.schedule import LowRankSchedule
from lrconvert.training.schedules.sifd import SIFD

__all__ = ["SIFD", "Cuttlefish", "Dense", "LowRankSchedule", "Pufferfish", "RankCurves", "StabilityCriterion"]
