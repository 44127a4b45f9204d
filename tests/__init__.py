"""The suite."""

import os
import sys

# Triton reads this when it is first imported, and importing maskops does that: torch's compiler asks whether Triton is
# there. Without a device its kernels are interpreted. Workers of xdist get what the controller has set.
_ARGUMENTS = " ".join(sys.argv).replace("--device=", "--device ")
_IS_ON_DEVICE = "--device " in _ARGUMENTS and "--device cpu" not in _ARGUMENTS
os.environ.setdefault("TRITON_INTERPRET", "0" if _IS_ON_DEVICE else "1")
