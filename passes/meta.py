"""Our entries of `node.meta`: each key, its value, who writes it and who reads it."""

GEMM = "qtrain_gemm"
"""`GemmNode`, site, role and operands of a GEMM. By find_sites, for later passes (`find_sites.gemm_of`), reports and deployment."""

SPLIT = "qtrain_split"
"""`Part`, which gradient of which convolution a node is. By split_convolution_backward, for restore_convolution_backward and
follow_layouts."""

HP = "qtrain_hp"
"""True: the GEMM stays in high precision. By keep_slow_gemms_hp and insert_qdq, for insert_qdq and fuse_matmul."""

QUANTIZED = "qtrain_quantized"
"""True: the GEMM's operands have been quantized. By insert_qdq, for a second run of it, gemm_costs and `qcompile.compare`."""

RANGE = "qtrain_range"
"""`RangeUse`, the operand that a `range` node serves. By insert_qdq, for share_quantized, attach_range_state and labels."""

STATISTIC = "qtrain_statistic"
"""What a node measures for a range: "amax", "clipped", ... By attach_range_state, for fuse_requantize."""

STATE = "qtrain_state"
"""(phase, "state" or "index") of an input that is range state. By state_layout, for buffers and the backend, which bind it, and for
what shows a graph without it."""

LAYOUT = "qtrain_layout"
"""`StateLayout` of such an input. By state_layout, for buffers and the backend's hooks."""

STRIDES = "qtrain_strides"
"""Strides of a GEMM's result before the GEMM became an integer one. By fuse_matmul, for follow_layouts."""

MARKED = "qtrain_marked"
"""True: codes with a mask in their sign. By fold_masks, for coarsen_codes and fuse_requantize."""

BITS = "qtrain_bits"
"""The width of codes that were marked or coarsened. By fold_masks and coarsen_codes, for coarsen_codes and pack_codes."""

GATE = "qtrain_gate"
"""True: the comparison that reads a mask back from the sign of codes. By fold_masks, for fuse_requantize."""

KERNEL = "qtrain_kernel"
"""The name of the kernel that computes a GEMM. By write_out_epilogues and users' patterns (`pattern_step`), for reports."""

PARAMETER = "qtrain_parameter"
"""The name of the Parameter that an attribute is. By forward_graph, for `PassContext`."""

GRAPH = "qtrain_graph"
"""The graph's number in QTRAIN_DUMP, on its inputs. By environment, for environment."""

LABEL = "qtrain_label"
"""A name for people. By `qcompile.inspect.labels`, which renames by it; a pass that replaces a node hands it on."""

FIRST_NAME = "qtrain_first_name"
"""The node's name before it was renamed for people. By `qcompile.inspect`, which finds a node's copies by it."""
