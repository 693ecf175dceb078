"""torchjac: whole Jacobians of PyTorch programs, from one call."""

from torchjac.api import hessian as hessian
from torchjac.api import jac as jac
from torchjac.api import jacobian as jacobian
from torchjac.api import pattern as pattern
from torchjac.errors import ArgumentError as ArgumentError
from torchjac.errors import CaptureRefused as CaptureRefused
from torchjac.errors import CoupledBatchError as CoupledBatchError
from torchjac.errors import DtypeError as DtypeError
from torchjac.errors import LocalPatternWarning as LocalPatternWarning
from torchjac.errors import LoopWarning as LoopWarning
from torchjac.errors import PatternError as PatternError
from torchjac.errors import PatternMissed as PatternMissed
from torchjac.errors import PatternWarning as PatternWarning
from torchjac.errors import PlanError as PlanError
from torchjac.errors import TorchjacError as TorchjacError
from torchjac.errors import UnusedInputError as UnusedInputError
from torchjac.errors import UnusedInputWarning as UnusedInputWarning
from torchjac.jacobian import Jacobian as Jacobian
from torchjac.record import Record as Record
from torchjac.record import last_run as last_run
from torchjac.sparsity.pattern import Pattern as Pattern

__version__ = "0.1.0"
