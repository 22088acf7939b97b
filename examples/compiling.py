"""How the examples' small programs are compiled."""

import jax

# XLA's fusion emitters take half of the time it takes to compile on a CPU and gain nothing here;
# from JAX 0.11 on they cannot be left out.
OPTIONS = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
