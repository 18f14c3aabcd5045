"""What methods are built from: kernels, collectives, projections, rotary embedding, host memory, streams."""
