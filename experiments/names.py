"""Names of contenders that more than one file has to know: who times them and who reads the rows.

Nothing is imported here, so `gpu_check` can read rows on a machine that lacks what an engine needs.
"""

# ---- ways to run a decode step (latency.py) ------------------------------------------------------
RECORDED = "recorded"
FUSED = "recorded, fused"
SMALL = "recorded, fused, small linears"
CONTIGUOUS = "recorded, contiguous"
# The same forward under an engine that is one step ahead.
AHEAD_OF = {name: f"{name}, ahead" for name in (RECORDED, FUSED, SMALL)}

# ---- ways to serve requests (workloads.py) -------------------------------------------------------
SERIAL = "serial"
AHEAD = "one step ahead"
AHEAD_FUSED = "one step ahead, fused"
STEP_TOKENS = 8192  # a budget so large that steps are bound by the GPU and not by the host
FEW_STEP_TOKENS = 2048
FEW = f", budget={FEW_STEP_TOKENS}"  # ends the name of a way with that budget
