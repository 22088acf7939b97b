"""Linear systems known by their products, and solutions that are differentiated by one."""

from hypergrad.linear.base import LinearSolver
from hypergrad.linear.direct import Cholesky, Nystrom
from hypergrad.linear.krylov import GMRES, BiCGSTAB, ConjugateGradient
from hypergrad.linear.preconditioned import Preconditioned
from hypergrad.linear.roots import custom_fixed_point, custom_root
from hypergrad.linear.series import Identity, Neumann, Richardson
